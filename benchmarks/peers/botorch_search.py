"""BoTorch on the same objectives: reads one JSON request, writes a line of JSON for each seed as it is done.

Run by a Python that has torch and botorch (`benchmarks/search_*.py --peer-python`). Modes:

  duet   BoTorch as the public code of DUET (arXiv 2502.00270) calls it: Matern 5/2 with a lengthscale per domain and
         Gamma priors (what SingleTaskGP was in the version it pins), standardised feedback, raw shares, upper
         confidence bound with beta 1, 20 restarts of 50 raw samples, shares constrained to sum to 1.
  loop   the same inside that code's loop: shares below 0.05 become 0 and the rest is not renormalised, and this is
         what the surrogate is told. The objective sees the mixture that such counts amount to.
  tuned  what somebody who knows BoTorch would write: square roots of shares; one lengthscale for all domains, and one
         for each from 5 d observations on; priors scaled to the spread of the roots; upper confidence bound of 2
         standard deviations; a box that is projected to the sphere of roots in place of the constraint (5 to 10
         times faster than SLSQP to the same values); starts from Dirichlet draws in place of the hit-and-run
         sampler; known noise as `train_Yvar`; a few random mixtures first. Chosen among the variants that were tried
         (log expected improvement, a lengthscale for each domain from the start, other priors) for the least regret.
  tuned-ei  the same with log expected improvement.

All of them recommend the tried mixture of highest posterior mean. Requests: see the function of each task.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import botorch
import numpy as np
import torch
from botorch.acquisition import LogExpectedImprovement, UpperConfidenceBound
from botorch.exceptions import BotorchError, ModelFittingError
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.transforms.input import InputTransform
from botorch.models.utils.gpytorch_modules import (
    get_covar_module_with_dim_scaled_prior,
    get_gaussian_likelihood_with_gamma_prior,
    get_matern_kernel_with_gamma_prior,
)
from botorch.optim import optimize_acqf
from gpytorch.kernels import MaternKernel
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from search_objectives import Feedback, Objective, draw  # noqa: E402

TUNED = ("tuned", "tuned-ei")
# Of the tuned modes: random mixtures that come first, starts of the optimiser, candidates that those are picked from.
INITIAL, STARTS, CANDIDATES = 3, 8, 1024
# Observations per domain from which on each domain has its own lengthscale.
ARD = 5
# What keeps the corner of the box that has no direction on the sphere.
TINY = 1e-9
# Of "loop".
THRESHOLD = 0.05
# What a fit or an optimisation may end with; the search goes on with a random mixture, and says how often.
FAILURES = (BotorchError, RuntimeError, ValueError)


class Sphere(InputTransform):
    """Points of a box, projected to the unit sphere: a box is all that the optimiser has to respect.

    They are spread like uniform numbers of the unit interval, which the default priors expect.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.transform_on_train = self.transform_on_eval = self.transform_on_fantasize = True
        spread = np.sqrt(np.random.default_rng(0).dirichlet(np.ones(size), 2048)).std(0).mean()
        self.factor = float(12**-0.5 / spread)

    def transform(self, X: Tensor) -> Tensor:
        X = X + TINY
        return self.factor * X / X.norm(dim=-1, keepdim=True)


def inputs(mode: str, mixtures: np.ndarray) -> Tensor:
    """What the surrogate sees: shares, or in the tuned modes their square roots."""
    return torch.from_numpy(np.sqrt(mixtures) if mode in TUNED else mixtures)


def fit(mode: str, mixtures: np.ndarray, values: np.ndarray, stderrs: np.ndarray | None) -> SingleTaskGP:
    """A fitted surrogate; one that BoTorch cannot fit keeps the mode of its priors."""
    x, y = inputs(mode, mixtures), torch.from_numpy(values)[:, None]
    size = mixtures.shape[1]
    if mode in TUNED:
        noise = None if stderrs is None else torch.from_numpy(stderrs)[:, None] ** 2
        kernel = get_covar_module_with_dim_scaled_prior(size, use_rbf_kernel=False)
        if len(values) < ARD * size:
            prior, constraint = kernel.lengthscale_prior, kernel.raw_lengthscale_constraint
            kernel = MaternKernel(nu=2.5, lengthscale_prior=prior, lengthscale_constraint=constraint)
        model = SingleTaskGP(x, y, noise, covar_module=kernel, input_transform=Sphere(size))
    else:
        model = SingleTaskGP(
            x,
            y,
            likelihood=get_gaussian_likelihood_with_gamma_prior(),
            covar_module=get_matern_kernel_with_gamma_prior(size),
        )
    try:
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    except ModelFittingError:
        model.eval()
    return model


def expect(mode: str, model: SingleTaskGP, mixtures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mean and standard deviation of the noise-free value."""
    with torch.no_grad():
        posterior = model.posterior(inputs(mode, mixtures)[:, None])
        return posterior.mean.flatten().numpy(), posterior.variance.sqrt().flatten().numpy()


def acquisition(mode: str, model: SingleTaskGP, mixtures: np.ndarray) -> Callable[[Tensor], Tensor]:
    """Improvement is over the best posterior mean of what was tried, as feedback is noisy."""
    if mode == "tuned-ei":
        return LogExpectedImprovement(model, best_f=float(expect(mode, model, mixtures)[0].max()))
    # Its beta is a variance.
    return UpperConfidenceBound(model, beta=4.0 if mode in TUNED else 1.0)


def starts(mode: str, score: Callable[[Tensor], Tensor], mixtures: np.ndarray, rng: np.random.Generator) -> Tensor:
    """The best of Dirichlet draws, sparse ones among them, vertices, and neighbours of what was tried."""
    size = mixtures.shape[1]
    dense, sparse = (rng.dirichlet(np.full(size, alpha), CANDIDATES // 2) for alpha in (1.0, 0.3))
    near = 0.9 * np.repeat(mixtures[-20:], 8, 0)
    near = near + 0.1 * rng.dirichlet(np.ones(size), len(near))
    candidates = inputs(mode, np.concatenate([np.eye(size), dense, sparse, near, mixtures]))[:, None]
    with torch.no_grad():
        top = score(candidates).topk(STARTS).indices
    return candidates[top]


def propose(mode: str, model: SingleTaskGP, mixtures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What BoTorch's optimiser returns; under its constraint the sum is 1 to the optimiser's tolerance."""
    size = mixtures.shape[1]
    score = acquisition(mode, model, mixtures)
    bounds = torch.stack([torch.zeros(size), torch.ones(size)]).double()
    if mode in TUNED:
        begin = starts(mode, score, mixtures, rng)
        roots, _ = optimize_acqf(score, bounds=bounds, q=1, num_restarts=STARTS, batch_initial_conditions=begin)
        return on_simplex((roots[0].detach().numpy() + TINY) ** 2)
    equal = [(torch.arange(size), torch.ones(size, dtype=torch.double), 1.0)]
    shares, _ = optimize_acqf(score, bounds=bounds, q=1, num_restarts=20, raw_samples=50, equality_constraints=equal)
    return shares[0].detach().numpy()


def on_simplex(shares: np.ndarray) -> np.ndarray:
    shares = np.maximum(shares, 0.0)
    return shares / shares.sum()


def first(mode: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """The mixtures tried before the surrogate is asked."""
    even = np.full((1, size), 1 / size)
    return np.concatenate([even, rng.dirichlet(np.ones(size), INITIAL - 1)]) if mode in TUNED else even


def study(request: dict) -> Iterator[dict]:
    """`mode`, `objective`, `domains`, `feedback`, `fraction`, `rounds`, `seeds`: searches of drawn objectives."""
    mode, size = request["mode"], request["domains"]
    for seed in request["seeds"]:
        objective = draw(request["objective"], size, seed)
        feedback = Feedback.draw(request["feedback"], objective, request["rounds"], seed, request["fraction"])
        yield {"seed": seed, **run(mode, size, objective, feedback, request["rounds"], seed)}


def run(mode: str, size: int, objective: Objective, feedback: Feedback, rounds: int, seed: int) -> dict:
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    # What the surrogate is told, and what was trained on, which in "loop" is not the same.
    told, tried = list(first(mode, size, rng)), []
    values: list[float] = []
    stderrs: list[float] = []
    wall, cpu, failures = [], [], 0
    for number in range(rounds):
        began, began_cpu = time.perf_counter(), time.process_time()
        if number == len(told):
            x = np.array(told)
            try:
                shares = propose(mode, fit(mode, x, np.array(values), known(stderrs)), x, rng)
            except FAILURES:
                shares, failures = rng.dirichlet(np.ones(size)), failures + 1
            if mode == "loop":
                shares = np.where(shares >= THRESHOLD, shares, 0.0)
                # In more than 20 domains all shares may be below; the code then trains on nothing at all.
                told.append(shares if shares.any() else np.full(size, 1 / size))
            else:
                told.append(on_simplex(shares))
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - began_cpu)
        tried.append(on_simplex(told[number]))
        value, stderr = feedback(objective(tried[-1]), number)
        values.append(float(value))
        if stderr is not None:
            stderrs.append(float(stderr))
    x = np.array(told[:rounds])
    try:
        mean, _ = expect(mode, fit(mode, x, np.array(values), known(stderrs)), x)
    except FAILURES:
        mean, failures = np.array(values), failures + 1
    recommended = tried[int(np.argmax(mean))]
    return {
        "mixtures": np.array(tried).tolist(),
        "values": values,
        "recommended": recommended.tolist(),
        "regret": objective.regret(recommended),
        "failures": failures,
        "wall_s": wall,
        "cpu_s": cpu,
    }


def known(stderrs: list[float]) -> np.ndarray | None:
    return np.array(stderrs) if stderrs else None


def speed(request: dict) -> Iterator[dict]:
    """`mode`, `domains`, `count`, `repeats`: times of one proposal with `count` observations and more."""
    mode, size, count, repeats = (request[name] for name in ("mode", "domains", "count", "repeats"))
    objective = draw("mixing-law", size, 0)
    feedback = Feedback.draw("gaussian", objective, count + repeats, 0)
    rng = np.random.default_rng(0)
    mixtures = rng.dirichlet(np.ones(size), count + repeats)
    values = np.array([feedback(objective(mixture), t)[0] for t, mixture in enumerate(mixtures)])
    # What torch does once in a process is not counted.
    even = rng.dirichlet(np.ones(3), 5)
    propose("tuned", fit("tuned", even, rng.standard_normal(5), None), even, rng)
    wall, cpu = [], []
    for n in range(count, count + repeats):
        began, began_cpu = time.perf_counter(), time.process_time()
        propose(mode, fit(mode, mixtures[:n], values[:n], None), mixtures[:n], rng)
        wall.append(1e3 * (time.perf_counter() - began))
        cpu.append(1e3 * (time.process_time() - began_cpu))
    yield {"wall_ms": wall, "cpu_ms": cpu}


def table(request: dict) -> Iterator[dict]:
    """`mode`, `rows`, `values`, `begin` (rows tried first, by seed), `stop` (rows looked for), `evaluations`."""
    mode, rows, values = request["mode"], np.array(request["rows"]), np.array(request["values"])
    for seed, begin in request["begin"].items():
        torch.manual_seed(int(seed))
        rng, tried = np.random.default_rng(int(seed)), list(begin)
        while len(tried) < request["evaluations"] and not set(tried) & set(request["stop"]):
            try:
                model = fit(mode, rows[tried], values[tried], None)
                with torch.no_grad():
                    score = acquisition(mode, model, rows[tried])(inputs(mode, rows)[:, None]).numpy()
            except FAILURES:
                score = rng.uniform(size=len(rows))
            score[tried] = -np.inf
            tried.append(int(np.argmax(score)))
        yield {"seed": int(seed), "tried": tried}


def predict(request: dict) -> Iterator[dict]:
    """`mode`, `mixtures`, `values`, `queries`: what is expected of each query, and the learned noise."""
    model = fit(request["mode"], np.array(request["mixtures"]), np.array(request["values"]), None)
    mean, deviation = expect(request["mode"], model, np.array(request["queries"]))
    noise = float((model.likelihood.noise.mean() * model.outcome_transform.stdvs.squeeze() ** 2).sqrt())
    yield {"mean": mean.tolist(), "std": deviation.tolist(), "noise": noise}


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    request = json.load(sys.stdin)
    versions = {"botorch": botorch.__version__, "torch": torch.__version__}
    tasks = {"study": study, "speed": speed, "table": table, "predict": predict}
    for line in tasks[request["task"]](request):
        print(json.dumps({**line, "versions": versions}), flush=True)


if __name__ == "__main__":
    main()
