"""Do influence scores say what training on other data would have done, and do they find bad examples?

Linear datamodeling score (Park et al. 2023, TRAK): models are trained on random halves of the data; the score is the
rank correlation, over halves, of a test example's measured loss with the sum of the influences of the half's examples,
mean over test examples. Halves differ in data alone: every training is deterministic. Then a tenth of the examples is
damaged (wrong labels; random tokens), and the area under the ROC curve says how well low mean influence on clean
validation examples finds them.

digits: multinomial logistic regression on scikit-learn's digits, trained to its optimum. language: a decoder trained
from scratch with Adam on sequences of several small Markov chains, one a topic; scores are of its linear layers.
Published for comparison: MNIST, logistic regression, IF with conjugate gradients 0.767 to 0.80, TRAK-50 0.68 (dattri).

    python benchmarks/attribution_quality.py
    python benchmarks/attribution_quality.py --only digits --subsets 100 --output
"""

from __future__ import annotations

import argparse
import time
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from search_common import parse, write
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

from duet_jax.influence import inverse, kfac
from duet_jax.influence.accuracy import spearman
from duet_jax.influence.any_loss import of_any_loss
from duet_jax.influence.features import Adam, moments
from duet_jax.influence.gradients import ExampleGradients
from duet_jax.influence.projections import CountSketch
from duet_jax.influence.tap import InnerProducts, Sketch, SquaredNorm
from duet_jax.models import llama

Scores = dict[str, Any]  # of every method: [training examples, test examples], higher is better for the test example
DECAY = 1e-3
WIDTHS = (32, 128, 512, 2048)
GROUPS, TOKENS, SEQUENCE = 6, 16, 13
RATE = 4e-3


def datamodeling(scores: Any, masks: np.ndarray, losses: np.ndarray) -> tuple[float, float]:
    """The linear datamodeling score, and its standard error over test examples."""
    predicted = masks @ np.asarray(scores, np.float64)
    found = np.array([spearman(predicted[:, j], -losses[:, j]) for j in range(losses.shape[1])])
    return float(found.mean()), float(found.std() / np.sqrt(len(found)))


def halves(count: int, subsets: int) -> np.ndarray:
    """Random halves of `count` examples, 0 and 1, `[subsets, count]`."""
    rng = np.random.default_rng(1)
    return np.stack([rng.permutation(count) < count // 2 for _ in range(subsets)]).astype(np.float32)


def unit(rows: Array) -> Array:
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def compare(rows: Array, targets: Array, name: str) -> Scores:
    return {f"dot{name}": rows @ targets.T, f"cosine{name}": unit(rows) @ unit(targets).T}


# Logistic regression.


def digit_loss(weights: Array, example: tuple[Array, Array]) -> Array:
    """Cross-entropy of one image `[65]`, weights `[65, 10]`."""
    x, label = example
    return jax.nn.logsumexp(x @ weights) - (x @ weights)[label]


def digit_objective(weights: Array, batch: tuple[Array, Array]) -> Array:
    return jnp.mean(jax.vmap(digit_loss, (None, 0))(weights, batch)) + DECAY / 2 * jnp.sum(weights**2)


@partial(jax.jit, static_argnums=3)
def fit_digits(x: Array, labels: Array, masks: Array, steps: int) -> Array:
    """Optima `[S, 65, 10]` of the objective on the examples in each mask `[S, N]`, by accelerated gradient descent."""
    count, hot = jnp.sum(masks, axis=1), jax.nn.one_hot(labels, 10)
    # Halves have up to twice the curvature of the whole.
    bound = 2 * 0.5 * jnp.linalg.norm(x, ord=2) ** 2 / x.shape[0] + DECAY
    momentum = (1 - jnp.sqrt(DECAY / bound)) / (1 + jnp.sqrt(DECAY / bound))

    def step(_: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
        old, ahead = state
        error = (jax.nn.softmax(jnp.einsum("nd,sdc->snc", x, ahead)) - hot) * (masks / count[:, None])[..., None]
        new = ahead - (jnp.einsum("nd,snc->sdc", x, error) + DECAY * ahead) / bound
        return new, new + momentum * (new - old)

    zeros = jnp.zeros((masks.shape[0], x.shape[1], 10))
    return jax.lax.fori_loop(0, steps, step, (zeros, zeros))[0]


def adam_digits(x: Array, labels: Array, steps: int) -> tuple[Array, Any]:
    """A checkpoint of an ordinary run with Adam on batches of 50, and the optimiser's state."""
    optimiser = optax.adam(0.02)

    def step(state: tuple[Array, Any], key: Array) -> tuple[tuple[Array, Any], None]:
        rows = jax.random.randint(key, (50,), 0, x.shape[0])
        update, after = optimiser.update(jax.grad(digit_objective)(state[0], (x[rows], labels[rows])), state[1])
        return (optax.apply_updates(state[0], update), after), None

    start = jnp.zeros((x.shape[1], 10))
    keys = jax.random.split(jax.random.key(0), steps)
    return jax.jit(lambda: jax.lax.scan(step, (start, optimiser.init(start)), keys)[0])()


def digit_scores(weights: Array, train: tuple[Array, Array], tests: tuple[Array, Array]) -> Scores:
    x, labels = train
    by_test = jax.vmap(jax.grad(digit_loss), (None, 0))(weights, tests)
    rows, targets = jax.vmap(jax.grad(digit_loss), (None, 0))(weights, train).reshape(len(x), -1), by_test
    scores = compare(rows, targets.reshape(len(targets), -1), "")
    for k in WIDTHS[:-1]:
        sketch = of_any_loss(digit_loss, Sketch(CountSketch(k)), chunk=64)
        scores |= compare(sketch(weights, train).values, sketch(weights, tests).values, f", sketch k={k}")
    # Adam's moments at the end of a run, plain gradients of the tests there.
    point, state = adam_digits(x, labels, 300)
    extra = {"moments": moments(state)}
    there = jax.vmap(jax.grad(digit_loss), (None, 0))(point, tests)
    inner = of_any_loss(digit_loss, InnerProducts(Adam()))(point, train, targets={"": there[:, None]}, **extra).values
    squares = of_any_loss(digit_loss, SquaredNorm(Adam()))(point, train, **extra).values
    scores["LESS"] = inner / jnp.sqrt(squares)[:, None] / jnp.linalg.norm(there, axis=(1, 2))
    # Ten labels an image, to take the chance out of the comparison.
    again = jnp.tile(x, (10, 1))
    drawn = jax.random.categorical(jax.random.key(2), again @ weights)
    error = jax.nn.softmax(again @ weights) - jax.nn.one_hot(drawn, 10)
    for name, corrected in (("K-FAC", False), ("EK-FAC", True)):
        curvature = {"": kfac.fit_layer(again[:, None], error[:, None], corrected=corrected)}
        # The Hessian is the Fisher matrix and the decay, exactly.
        solved = kfac.precondition(curvature, {"": targets[:, None]}, kfac.Damping(absolute=DECAY))[""]
        scores[name] = rows @ solved.reshape(len(targets), -1).T

    def on_batch(v: Array, batch: tuple[Array, Array]) -> Array:
        return inverse.hessian_product(digit_objective, weights, batch)(v)

    whole = partial(on_batch, batch=train)
    solve = jax.jit(partial(jax.lax.map, lambda t: inverse.conjugate_gradients(whole, t, steps=300).solution))
    scores["CG"] = -inverse.influences(digit_loss, weights, train, solve(targets))
    scale = 2 * float(inverse.largest_eigenvalue(whole, weights, key=jax.random.key(0)))

    def draw(key: Array) -> tuple[Array, Array]:
        chosen = jax.random.randint(key, (50,), 0, len(x))
        return x[chosen], labels[chosen]

    # All targets at once: they share the batches.
    together = inverse.lissa(
        jax.vmap(on_batch, (0, None)), targets, draw, key=jax.random.key(3), scale=scale, depth=1000
    )
    scores["LiSSA"] = -inverse.influences(digit_loss, weights, train, together.solution)
    return scores


def run_digits(options: argparse.Namespace) -> dict[str, Any]:
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))[: options.train + options.tests]
    images = jnp.asarray(np.c_[data.data[order] / 16, np.ones(len(order))], jnp.float32)
    labels = jnp.asarray(data.target[order])
    train = images[: options.train], labels[: options.train]
    tests = images[options.train :], labels[options.train :]
    masks = halves(options.train, options.subsets)
    fitted = fit_digits(*train, jnp.asarray(masks), options.descent)
    losses = jax.vmap(lambda w: jax.vmap(digit_loss, (None, 0))(w, tests))(fitted)
    everything = jnp.ones((1, options.train))
    scores = digit_scores(fit_digits(*train, everything, options.descent)[0], train, tests)
    results = {name: datamodeling(found, masks, np.asarray(losses)) for name, found in scores.items()}
    bad = np.arange(options.train) < options.train // 10
    damaged = train[0], jnp.where(bad, (train[1] + 1 + jnp.arange(options.train) % 9) % 10, train[1])
    weights = fit_digits(*damaged, everything, options.descent)[0]
    areas = find_bad(digit_scores(weights, damaged, tests), bad)
    areas["loss itself"] = float(roc_auc_score(bad, jax.vmap(digit_loss, (None, 0))(weights, damaged)))
    return table("digits", results, areas)


# A language model.

MODEL = llama.LlamaConfig(
    vocab_size=TOKENS + GROUPS,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
)
LAYERS = ExampleGradients(MODEL, target="full", remat="none")


@lru_cache(maxsize=32)
def tapped(method: str, *settings: Any) -> Any:
    """A compiled method of `LAYERS`."""
    return getattr(LAYERS, method)(*settings)


def sequences(count: int, seed: int) -> np.ndarray:
    """`[count, SEQUENCE]`: a topic, then steps of its own Markov chain with two successors of every token."""
    tables = np.random.default_rng(0).integers(0, TOKENS, (GROUPS, TOKENS, 2))
    rng = np.random.default_rng(seed)
    rows = np.zeros((count, SEQUENCE), np.int32)
    topics = np.arange(count) % GROUPS
    rows[:, 0], rows[:, 1] = TOKENS + topics, rng.integers(0, TOKENS, count)
    for t in range(2, SEQUENCE):
        rows[:, t] = tables[topics, rows[:, t - 1], (rng.random(count) < 0.2).astype(int)]
    return rows


def token_weights(tokens: Any) -> Array:
    return jnp.broadcast_to(jnp.arange(SEQUENCE) >= 2, tokens.shape).astype(jnp.float32)


def sequence_losses(params: llama.Params, tokens: Array) -> Array:
    """Mean loss of each sequence's tokens, `[B]`."""
    hidden = llama.hidden_states(MODEL, params, tokens)[:, 1:-1]
    log_probs = jax.nn.log_softmax(hidden @ llama.output_head(params).T)
    return -jnp.mean(jnp.take_along_axis(log_probs, tokens[:, 2:, None], axis=-1)[..., 0], axis=1)


@partial(jax.jit, static_argnums=2)
def train_language(tokens: Array, mask: Array, steps: int) -> tuple[Any, Any]:
    """Parameters and Adam's states at thirds of a training on all examples in the mask `[N]` at every step."""
    schedule = optax.cosine_decay_schedule(RATE, steps, 0.1)
    optimiser = optax.adam(schedule)
    params = llama.init(MODEL, key=jax.random.key(0))

    def step(state: Any, _: Any) -> tuple[Any, None]:
        gradient = jax.grad(lambda p: jnp.sum(mask * sequence_losses(p, tokens)) / jnp.sum(mask))(state[0])
        update, after = optimiser.update(gradient, state[1])
        return (optax.apply_updates(state[0], update), after), None

    def third(state: Any, _: Any) -> tuple[Any, Any]:
        state = jax.lax.scan(step, state, None, length=steps // 3)[0]
        return state, state

    return jax.lax.scan(third, (params, optimiser.init(params)), None, length=3)[1]


def language_scores(checkpoints: Any, train: Array, tests: Array, steps: int) -> Scores:
    params, state = jax.tree.map(lambda x: x[-1], checkpoints)
    args = (None, train, token_weights(train))
    of_tests = (None, tests, token_weights(tests))

    def gradients_of(params: llama.Params) -> dict[str, Array]:
        total = kfac.total_gradient(LAYERS)
        return jax.lax.map(lambda row: total(params, None, row[None], token_weights(row[None])).values, tests)

    targets = gradients_of(params)
    inner, norms = tapped("inner_products"), tapped("squared_norms")
    dots = inner(params, *args, targets=targets).values
    lengths = [jnp.sqrt(norms(params, *which).values) for which in (args, of_tests)]
    scores = {"dot": dots, "cosine": dots / lengths[0][:, None] / lengths[1]}
    for k in WIDTHS[1:]:
        sketch = tapped("sketch", CountSketch(k))
        scores |= compare(sketch(params, *args).values, sketch(params, *of_tests).values, f", sketch k={k}")
    scores["LESS"] = 0
    for i in range(3):
        point, moved = jax.tree.map(lambda x, i=i: x[i], checkpoints)
        there, extra = gradients_of(point), {"moments": moments(moved[0])}
        products = tapped("inner_products", Adam())(point, *args, targets=there, **extra).values
        squares = tapped("squared_norms", Adam())(point, *args, **extra).values
        # Mean rate of each third of the cosine, up to a factor; the targets' norms.
        rate = float(optax.cosine_decay_schedule(RATE, steps, 0.1)((i + 0.5) / 3 * steps))
        sizes = jnp.sqrt(sum(jnp.sum(jnp.square(x), axis=(1, 2, 3)) for x in there.values()))
        scores["LESS"] += rate * products / jnp.sqrt(squares)[:, None] / sizes
    key = jax.random.key(5)
    for name, corrected in (("K-FAC", False), ("EK-FAC", True)):
        curvature = kfac.fit(LAYERS, params, None, [args[1:]], key=key, corrected=corrected)
        scores[name] = inner(params, *args, targets=kfac.precondition(curvature, targets)).values
    white = kfac.whitened_sketch(LAYERS, CountSketch(WIDTHS[-1]), curvature)
    both = white(params, *args).values, white(params, *of_tests).values
    scores |= compare(*both, f", EK-FAC, sketch k={WIDTHS[-1]}")
    labels = kfac.sample_labels(LAYERS)(params, None, train, jax.random.fold_in(key, 0))
    damping = 0.1 * float(np.mean(np.concatenate([np.ravel(eigen.values) for eigen in curvature.values()])))
    product = kfac.fisher_product(LAYERS, params, *args, labels)
    solve = jax.jit(partial(jax.lax.map, lambda t: inverse.conjugate_gradients(product, t, damping=damping, steps=12)))
    scores["CG (Fisher)"] = inner(params, *args, targets=solve(targets).solution).values
    scores["LiSSA (Fisher)"] = inner(
        params, *args, targets=_lissa(params, args, labels, targets, product, damping)
    ).values
    return scores


def _lissa(params: llama.Params, args: Any, labels: Array, targets: Any, product: Any, damping: float) -> Any:
    def on_batch(v: Any, rows: Array) -> Any:
        here = kfac.fisher_product(LAYERS, params, None, args[1][rows], args[2][rows], labels[rows])
        return jax.lax.map(here, v)

    one = jax.tree.map(lambda x: x[0], targets)
    scale = 3 * float(jax.jit(lambda: inverse.largest_eigenvalue(product, one, key=jax.random.key(0), steps=8))())
    draw = partial(jax.random.randint, shape=(32,), minval=0, maxval=len(labels))
    return inverse.lissa(
        on_batch, targets, draw, key=jax.random.key(3), scale=scale, depth=40, damping=damping
    ).solution


def run_language(options: argparse.Namespace) -> dict[str, Any]:
    train, tests = jnp.asarray(sequences(options.sequences, 1)), jnp.asarray(sequences(2 * GROUPS, 2))
    masks = halves(len(train), options.trainings)

    @jax.jit
    def retrain(masks: Array) -> Array:
        def one(mask: Array) -> Array:
            params, _ = train_language(train, mask, options.steps)
            return sequence_losses(jax.tree.map(lambda x: x[-1], params), tests)

        return jax.lax.map(one, masks)

    everything = jnp.ones(len(train))
    whole = train_language(train, everything, options.steps)
    scores = language_scores(whole, train, tests, options.steps)
    losses = np.asarray(retrain(jnp.asarray(masks)))
    last = jax.tree.map(lambda x: x[-1], whole[0])
    means = [float(jnp.mean(sequence_losses(last, which))) for which in (train, tests)]
    print(
        f"language: loss {means[0]:.2f} of training, {means[1]:.2f} of tests; {losses.mean():.2f} of tests for halves"
    )
    # What knowing the data's making is worth: a topic helps itself.
    scores["same topic"] = np.equal.outer(np.arange(len(train)) % GROUPS, np.arange(len(tests)) % GROUPS)
    results = {name: datamodeling(found, masks, losses) for name, found in scores.items()}
    bad = np.random.default_rng(3).permutation(len(train)) < len(train) // 10
    noise = np.random.default_rng(4).integers(0, TOKENS, train.shape)
    damaged = jnp.where(bad[:, None] & (np.arange(SEQUENCE) > 0), noise, train)
    whole = train_language(damaged, everything, options.steps)
    areas = find_bad(language_scores(whole, damaged, tests, options.steps), bad)
    last = jax.tree.map(lambda x: x[-1], whole[0])
    areas["loss itself"] = float(roc_auc_score(bad, sequence_losses(last, damaged)))
    return table("language", results, areas)


def find_bad(scores: Scores, bad: np.ndarray) -> dict[str, float]:
    """Area under the ROC curve of low mean scores."""
    return {name: float(roc_auc_score(bad, -np.asarray(found).mean(axis=1))) for name, found in scores.items()}


def table(title: str, results: dict[str, tuple[float, float]], areas: dict[str, float]) -> dict[str, Any]:
    print(f"\n{title:>32}  {'LDS':>5} {'+-':>5}  {'AUROC':>5}")
    rows = {}
    for name in dict.fromkeys([*results, *areas]):
        rows[name] = dict(zip(("lds", "lds_error"), results.get(name, ()), strict=False))
        rows[name] |= {"auroc": areas[name]} if name in areas else {}
        shown = [f"{rows[name][key]:5.3f}" if key in rows[name] else "     " for key in ("lds", "lds_error", "auroc")]
        print(f"{name:>32}  {shown[0]} {shown[1]}  {shown[2]}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("digits", "language"))
    parser.add_argument("--subsets", type=int, default=50, help="halves of digits")
    parser.add_argument("--train", type=int, default=800)
    parser.add_argument("--tests", type=int, default=150)
    parser.add_argument("--descent", type=int, default=600, help="steps to the optimum on digits")
    parser.add_argument("--trainings", type=int, default=40, help="halves of the language data")
    parser.add_argument("--sequences", type=int, default=144)
    parser.add_argument("--steps", type=int, default=60, help="of each training of the language model, 3 divides it")
    options = parse(parser, "attribution_quality")
    results = {}
    for name, run in (("digits", run_digits), ("language", run_language)):
        if options.only in (None, name):
            began = time.perf_counter()
            results[name] = run(options)
            print(f"{name}: {time.perf_counter() - began:.0f} s")
    write(options.output, options, {"results": results})


if __name__ == "__main__":
    main()
