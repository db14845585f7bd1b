"""The masked Gaussian process: scikit-learn's posterior, whatever the padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, DotProduct, Matern

from duet_jax.search.surrogate import Problem, Surrogate, noise_floor, standardise

D, N = 4, 11
SURROGATE = Surrogate(D)
LENGTHSCALES = np.array([0.5, 0.6, 0.8, 1.1])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def raw(known: bool = True):
    rng = np.random.default_rng(0)
    mixtures = rng.dirichlet(np.ones(D), N)
    values = 3 + 2 * np.sin(5 * mixtures[:, 0]) + 0.1 * rng.standard_normal(N)
    return mixtures, values, rng.uniform(0.05, 0.3, N) * known


def problem(surrogate: Surrogate, capacity: int, known: bool = True, count: int = N) -> Problem:
    mixtures, values, errors = (np.zeros((capacity, *x.shape[1:])) for x in raw())
    mixtures[:N], values[:N], errors[:N] = raw(known)
    mask = jnp.arange(capacity) < count
    standard, centre, spread = standardise(jnp.asarray(values), mask)
    inputs = surrogate.inputs(jnp.sqrt(mixtures), mask)
    return Problem(inputs, standard, jnp.asarray(errors / spread) ** 2, centre, spread)


def chosen(surrogate: Surrogate):
    mean, _ = surrogate.prior(None)
    relevance = jnp.log(0.6 / LENGTHSCALES) if surrogate.ard else mean.relevance
    return mean._replace(
        lengthscale=jnp.log(0.6),
        relevance=relevance,
        signal=jnp.log(1.7),
        noise=jnp.log(0.03),
        slope=mean.slope * 0 - 1,
    )


def nothing(surrogate: Surrogate):
    return surrogate.inputs(jnp.zeros((0, D)))


@pytest.mark.parametrize("trend", [None, "linear"])
def test_posterior_and_likelihood_equal_scikit_learn(trend):
    surrogate = Surrogate(D, trend=trend)
    seen, at = problem(surrogate, 16), chosen(surrogate)
    mixtures, values, errors = raw()
    spread = values.std(ddof=1)
    queries = np.random.default_rng(1).dirichlet(np.ones(D), 7)
    kernel = ConstantKernel(1.7) * Matern(LENGTHSCALES, nu=2.5)

    def theirs(points):
        return np.sqrt(points)

    if trend:
        # scikit-learn's kernels see all columns: the trend's are appended with a lengthscale that hides them.
        inputs = surrogate.inputs(jnp.sqrt(np.concatenate([mixtures, queries])))
        table = {p.tobytes(): t for p, t in zip([*mixtures, *queries], np.asarray(inputs.trend), strict=True)}
        kernel = _Split(kernel, np.exp(-1.0))

        def theirs(points):
            return np.concatenate([np.sqrt(points), [table[p.tobytes()] for p in points]], axis=1)

    noise = 0.03 + noise_floor(np.float64) + (errors / spread) ** 2
    reference = GaussianProcessRegressor(kernel, alpha=noise, optimizer=None)
    reference.fit(theirs(mixtures), (values - values.mean()) / spread)
    mean, deviation = reference.predict(theirs(queries), return_std=True)
    posterior = surrogate.condition(at, seen, nothing(surrogate))
    found_mean, found_deviation = surrogate.moments(posterior, jnp.sqrt(queries))
    np.testing.assert_allclose(found_mean, mean, atol=1e-8)
    np.testing.assert_allclose(found_deviation, deviation, atol=1e-8)
    # We leave out the constant of the normal density; padded rows then add nothing.
    evidence, _ = surrogate.log_evidence(at, seen, None, seen.values)
    likelihood = reference.log_marginal_likelihood_value_ + 0.5 * N * np.log(2 * np.pi)
    assert float(evidence) == pytest.approx(float(likelihood), abs=1e-8)


class _Split(DotProduct):
    """A kernel of the first D columns plus a linear one of the others."""

    def __init__(self, kernel, slope):
        super().__init__(0.0, "fixed")
        self.kernel, self.slope = kernel, slope

    def __call__(self, x, y=None, eval_gradient=False):
        other = x if y is None else y
        linear = self.slope * x[:, D:] @ other[:, D:].T
        return self.kernel(x[:, :D], other[:, :D]) + linear

    def diag(self, x):
        return np.diag(self(x))


@pytest.mark.parametrize("surrogate", [SURROGATE, Surrogate(D, ard=False), Surrogate(D, map="raw", trend="log")])
def test_padding_changes_nothing(surrogate):
    queries = jnp.sqrt(np.random.default_rng(2).dirichlet(np.ones(D), 5))
    fits, moments = [], []
    for capacity in (N, 16, 64):
        hyperparameters, seen = jax.jit(surrogate.fit)(problem(surrogate, capacity))
        fits.append(hyperparameters)
        posterior = surrogate.condition(fits[0], seen, nothing(surrogate))
        moments.append(surrogate.moments(posterior, queries))
    for fit, moment in zip(fits[1:], moments[1:], strict=True):
        np.testing.assert_allclose(moment, moments[0], atol=1e-12)
        # The descent magnifies what rounding changes in its first steps.
        for one, two in zip(fit[:4], fits[0][:4], strict=True):
            np.testing.assert_allclose(one, two, atol=1e-6)


def test_known_errors_leave_little_noise_to_be_learned():
    seen = problem(SURROGATE, 16)
    told, _ = jax.jit(SURROGATE.fit)(seen)
    untold, _ = jax.jit(SURROGATE.fit)(seen._replace(variances=jnp.zeros(16)))
    assert told.noise < untold.noise - 2
    # One that is not known is reason enough to expect as much as ever.
    mixed, _ = jax.jit(SURROGATE.fit)(seen._replace(variances=seen.variances.at[0].set(0.0)))
    assert mixed.noise > told.noise + 2


def test_fit_is_a_stationary_point_that_no_random_point_beats():
    surrogate = Surrogate(D, ard=False)
    seen = problem(surrogate, 16)
    mean, scale = surrogate.prior(None, 1.0)

    @jax.jit
    def height(at):
        evidence, _ = surrogate.log_evidence(at, seen, None, seen.values)
        prior = [0.5 * jnp.sum(((x - m) / s) ** 2) for x, m, s in zip(at, mean, scale, strict=True) if jnp.size(x)]
        return evidence - sum(prior)

    fitted, _ = jax.jit(surrogate.fit)(seen)
    slope = jax.grad(height)(fitted)
    assert max(abs(float(jnp.sum(g))) for g in slope[:4]) < 1e-3
    rng = np.random.default_rng(3)
    for _ in range(200):
        point = jax.tree.map(lambda m, s: jnp.asarray(rng.normal(m, 1.5 * s)), mean, scale)
        assert float(height(point)) <= float(height(fitted)) + 1e-6


def test_few_observations_give_one_lengthscale_and_many_find_the_domain_that_matters():
    rng = np.random.default_rng(0)
    mixtures = rng.dirichlet(np.ones(D), 60)
    values = np.sin(6 * np.sqrt(mixtures[:, 0]))
    relevances = []
    for count in (3, 60):
        mask = jnp.arange(64) < count
        roots = jnp.zeros((64, D)).at[:60].set(np.sqrt(mixtures))
        standard, centre, spread = standardise(jnp.zeros(64).at[:60].set(values), mask)
        seen = Problem(SURROGATE.inputs(roots, mask), standard, jnp.zeros(64), centre, spread)
        relevances.append(np.asarray(jax.jit(SURROGATE.fit)(seen)[0].relevance))
    few, many = relevances
    assert np.ptp(few) < 0.3
    assert many.argmax() == 0 and many[0] - np.delete(many, 0).max() > 0.5


def test_equal_feedback_and_a_single_observation_are_no_trouble():
    seen = problem(SURROGATE, 16)
    flat = seen._replace(values=jnp.zeros(16))
    for case in (flat, problem(SURROGATE, 16, count=1)):
        posterior = SURROGATE.condition(*jax.jit(SURROGATE.fit)(case), nothing(SURROGATE))
        mean, deviation = SURROGATE.moments(posterior, case.inputs.features[:3])
        assert np.all(np.isfinite(mean)) and np.all(deviation > 0)


def test_pending_mixtures_lower_the_deviation_and_not_the_mean():
    seen, at = problem(SURROGATE, 16), chosen(SURROGATE)
    there = jnp.sqrt(jnp.asarray([[0.7, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0]]))
    without = SURROGATE.condition(at, seen, nothing(SURROGATE))
    with_ = SURROGATE.condition(at, seen, SURROGATE.inputs(there, jnp.asarray([True, False])))
    (mean, deviation), (new_mean, new_deviation) = (SURROGATE.moments(p, there[:1]) for p in (without, with_))
    np.testing.assert_allclose(new_mean, mean, atol=1e-10)
    assert float(new_deviation[0]) < 0.5 * float(deviation[0])
