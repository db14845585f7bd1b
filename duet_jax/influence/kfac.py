"""K-FAC and EK-FAC: the curvature of a decoder's loss, layer by layer, as Kronecker products.

The gradient of a linear layer for one example is `G = x^T d`. K-FAC (Martens and Grosse 2015, arXiv 1503.05671)
takes the Fisher matrix E[vec(G) vec(G)^T] for the Kronecker product of E[x^T x] and E[d^T d]; EK-FAC (George et al.
2018, arXiv 1806.03884) keeps the eigenvectors Q_in, Q_out of the two and measures what the Fisher matrix is along
them, E[(Q_in^T G Q_out)^2]. Its inverse is then a rotation, a division and the rotation back (Grosse et al. 2023,
arXiv 2308.03296, section 2.2). Everything is of sums of token losses, whatever reduction of an example's loss is asked
for elsewhere: the curvature of training that counts every token of a batch the same. The output head has no part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from duet_jax.distributed.place import map_rows, readable
from duet_jax.influence.features import Feature, Gradient, Moments, State
from duet_jax.influence.gradients import CHUNK, ExampleGradients, Examples, program_of
from duet_jax.influence.projections import Projection, blocks, product
from duet_jax.influence.tap import Context, InnerProducts, SecondMoments, Sketch, Source
from duet_jax.models import llama
from duet_jax.models.lora import Lora


class Eigen(NamedTuple):
    """Eigenvectors and eigenvalues of the curvature of one parameter in all L layers.

    Attributes:
      inputs: float32 `[L, rows, rows]`, eigenvectors of the second moment of inputs, one a column.
      outputs: float32 `[L, cols, cols]`, those of the derivatives of outputs.
      values: float32 `[L, rows, cols]`, mean squares of single examples' gradients along pairs of them.
    """

    inputs: Array
    outputs: Array
    values: Array


Curvature = dict[str, Eigen]
"""Of every parameter, with the names of `ExampleGradients.named`."""


@dataclasses.dataclass(frozen=True)
class Damping:
    """What is added to eigenvalues: `relative` times their mean in each layer, or `absolute` where it is given."""

    relative: float = 0.1
    absolute: float | None = None

    def powers(self, eigen: Eigen, power: float) -> Array:
        """Damped eigenvalues to a negative power, float32 `[L, rows, cols]`; 0 in layers without any gradient."""
        added = self.relative * jnp.mean(eigen.values, axis=(1, 2), keepdims=True)
        total = eigen.values + (added if self.absolute is None else self.absolute)
        return jnp.where(total > 0, jnp.where(total > 0, total, 1.0) ** power, 0.0)


DAMPING = Damping()


@lru_cache(maxsize=64)
def sample_labels(gradients: ExampleGradients) -> Callable[[llama.Params, Lora | None, Array, Array], Array]:
    """Draws labels from the model, for its Fisher matrix.

    Returns:
      A compiled function `(params, lora, tokens, key) -> labels`, int32 `[B, T]` both: `labels[t]` drawn given the
      true tokens before t; the first token stays.
    """

    @jax.jit
    def sample(params: llama.Params, lora: Lora | None, tokens: Array, key: Array) -> Array:
        dtype = gradients.compute_dtype
        config, mesh = gradients.config, gradients.mesh
        hidden = llama.hidden_states(config, params, tokens, lora=lora, compute_dtype=dtype, mesh=mesh)[:, :-1]
        head = llama.output_head(params).astype(dtype)

        def of_rows(hidden: Array, keys: Array, head: Array) -> Array:
            def one(token: tuple[Array, Array]) -> Array:
                logits = jnp.dot(head, token[0], preferred_element_type=jnp.float32)
                return jax.random.categorical(token[1], logits)

            flat = hidden.reshape(-1, hidden.shape[-1]).astype(dtype)
            drawn = jax.lax.map(one, (flat, keys.reshape(-1)), batch_size=CHUNK)
            return drawn.reshape(hidden.shape[:2]).astype(tokens.dtype)

        keys = jax.random.split(key, hidden[..., 0].size).reshape(hidden.shape[:2])
        return jnp.concatenate([tokens[:, :1], map_rows(mesh, of_rows, (hidden, keys), (head,))], axis=1)

    return sample


def fit(
    gradients: ExampleGradients,
    params: llama.Params,
    lora: Lora | None,
    batches: Iterable[tuple[Any, Any]],
    *,
    key: Array | None,
    corrected: bool = True,
) -> Curvature:
    """Measures the curvature on batches.

    Args:
      gradients: which parameters.
      params: of the decoder.
      lora: its adapters.
      batches: pairs of tokens int32 `[B, T]` and weights float32 `[B, T]`; gone through twice, so no generator. Rows
        without weight do not count.
      key: labels are drawn from the model, which gives the Fisher matrix; None takes the true ones (the "empirical
        Fisher", which is another matrix).
      corrected: EK-FAC; else K-FAC's eigenvalues, the products of those of both factors, without the second pass.

    Raises:
      ValueError: the head is asked for, or there are no examples, or batches can be gone through only once.
    """
    plain = _without_head(gradients)
    draw = sample_labels(plain)

    def total(rule: SecondMoments | EigenSquares, **extra: Any) -> tuple[Any, float]:
        found, examples, run = None, 0.0, program_of(plain, rule)
        for number, (tokens, weights) in enumerate(batches):
            labels = None if key is None else draw(params, lora, tokens, jax.random.fold_in(key, number))
            values = run(params, lora, tokens, weights, labels=labels, **extra).values
            found = values if found is None else _add(found, values)
            examples += float(np.count_nonzero(np.any(np.asarray(weights) != 0, axis=1)))
        if not examples:
            raise ValueError("No example has a weight; batches must be a list of batches, not a generator.")
        return found, examples

    sums, examples = total(SecondMoments())
    sums = readable(sums)
    curvature = {name: _decompose(factors, examples) for name, factors in sums.items()}
    if not corrected:
        return curvature
    squares, examples = total(EigenSquares(), moments=_as_moments(plain, curvature))
    return {name: eigen._replace(values=squares[name] / examples) for name, eigen in curvature.items()}


def fit_layer(x: Array, d: Array, *, corrected: bool = True) -> Eigen:
    """The curvature of one linear layer of any model (L = 1), from what went in and what came back.

    Args:
      x: inputs of all examples and tokens, `[B, T, rows]`.
      d: derivatives of the examples' losses in the outputs, `[B, T, cols]`; for the Fisher matrix, of losses of labels
        drawn from the model.
      corrected: EK-FAC, else K-FAC.
    """
    sums = SecondMoments().of_factors("", Context(0), x, d)
    eigen = _decompose(jax.tree.map(lambda a: a[None], sums), x.shape[0])
    if not corrected:
        return eigen
    state = State(None, (eigen.inputs[0], eigen.outputs[0]))
    return eigen._replace(values=EigenSquares().of_factors("", Context(0, state), x, d)[None] / x.shape[0])


@partial(jax.jit, donate_argnums=0)
def _add(total: Any, values: Any) -> Any:
    return jax.tree.map(jnp.add, total, values)


def _decompose(sums: Mapping[str, Array], examples: float) -> Eigen:
    """K-FAC's eigenvectors and eigenvalues from sums over tokens, in float64 on the host."""
    tokens = np.maximum(np.asarray(sums["tokens"], np.float64), 1)[:, None]
    (of_x, inputs), (of_d, outputs) = (np.linalg.eigh(np.asarray(sums[end], np.float64)) for end in ("x", "d"))
    # Mean over examples of sums over tokens: E_tokens[x x^T] (x) E_tokens[d d^T] times the tokens of an example.
    values = np.maximum(of_x, 0)[:, :, None] * np.maximum(of_d / tokens, 0)[:, None, :] / examples
    return Eigen(*(jnp.asarray(array, jnp.float32) for array in (inputs, outputs, values)))


def precondition(curvature: Curvature, targets: Mapping[str, Array], damping: Damping = DAMPING) -> dict[str, Array]:
    """`(F + damping)^-1` times target gradients `{name: [Q, L, rows, cols]}`, of the same shapes.

    Inner products of plain training gradients with the result are, with the sign turned, EK-FAC influences. Parameters
    that the curvature leaves out get 0, and have no part in influences: so it can be cut down to some of them.

    Raises:
      ValueError: targets of some parameters of the curvature are missing.
    """
    if not set(curvature) <= set(targets):
        raise ValueError(f"Target gradients must be of all of the parameters {', '.join(sorted(curvature))}.")
    return {
        name: _precondition(curvature[name], array, damping) if name in curvature else jnp.zeros_like(array)
        for name, array in targets.items()
    }


@partial(jax.jit, static_argnums=2)
def _precondition(eigen: Eigen, targets: Array, damping: Damping) -> Array:
    turn = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    turned = turn("lri,qlrc,lco->qlio", eigen.inputs, targets, eigen.outputs) * damping.powers(eigen, -1.0)
    return turn("lri,qlio,lco->qlrc", eigen.inputs, turned, eigen.outputs)


def project(projection: Projection, targets: Mapping[str, Array]) -> Array:
    """Projections of whole gradients `{name: [Q, L, rows, cols]}`, float32 `[Q, k]`, as `sketch` makes of examples.

    Of preconditioned targets, they are queries for stores of plain training gradients.
    """
    parts = [
        [projection.project_dense(name, layer, array[:, layer]) for layer in range(array.shape[1])]
        for name, array in sorted(targets.items())
    ]
    if projection.per_layer:
        return jnp.concatenate([part for layers in parts for part in layers], axis=1)
    return sum(part for layers in parts for part in layers)  # type: ignore[return-value]


def whitened_sketch(
    gradients: ExampleGradients, projection: Projection, curvature: Curvature, damping: Damping = DAMPING
) -> Callable[..., Examples]:
    """Projections of `(F + damping)^-1/2` times each example's gradient, float32 `[B, k]`.

    For both sides of an inner product: their dot products estimate `g^T (F + damping)^-1 h` with a smaller error
    than `project` of one preconditioned side does, and their cosines are those of the whitened gradients.

    Returns:
      `(params, lora, tokens, weights, *, labels=None) -> Examples`, compiled.

    Raises:
      ValueError: the head is asked for.
    """
    plain = dataclasses.replace(_without_head(gradients), reduction=gradients.reduction)
    program = program_of(plain, WhitenedSketch(projection, Eigenbasis()))
    scaled = {
        name: eigen._replace(values=jax.jit(damping.powers, static_argnums=1)(eigen, -0.5))
        for name, eigen in curvature.items()
    }
    return partial(program, moments=_as_moments(plain, scaled))


def total_gradient(gradients: ExampleGradients) -> Callable[..., Examples]:
    """Sums over examples of their gradients, `{name: [L, rows, cols]}`, by a tap like the gradients of each.

    Returns:
      As the methods of `ExampleGradients`.

    Raises:
      ValueError: the head is asked for.
    """
    return program_of(dataclasses.replace(_without_head(gradients), reduction=gradients.reduction), Total())


def fisher_product(
    gradients: ExampleGradients, params: llama.Params, lora: Lora | None, tokens: Array, weights: Array, labels: Array
) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    """`v -> mean_b g_b <g_b, v>` over the gradients of loss sums, for `inverse.conjugate_gradients`.

    Two backward passes a product: one for inner products with every example, one for their sum with those weights.
    With labels of `sample_labels` it estimates the Fisher, or Gauss-Newton, product; with the tokens themselves, the
    empirical one.

    Args:
      gradients: which parameters; its `micro_batch` bounds the memory.
      params: of the decoder.
      lora: its adapters.
      tokens: int32 `[B, T]`.
      weights: float32 `[B, T]`.
      labels: int32 `[B, T]`.

    Raises:
      ValueError: the head is asked for.
    """
    plain = _without_head(gradients)
    inner, total = program_of(plain, InnerProducts()), program_of(plain, Total())
    examples = jnp.maximum(jnp.count_nonzero(jnp.any(weights != 0, axis=1)), 1)

    def multiply(v: Mapping[str, Array]) -> dict[str, Array]:
        targets = {name: array[None] for name, array in v.items()}
        along = inner(params, lora, tokens, weights, labels=labels, targets=targets).values
        return total(params, lora, tokens, weights * along / examples, labels=labels).values

    return multiply


def _without_head(gradients: ExampleGradients) -> ExampleGradients:
    if gradients.head:
        raise ValueError("The curvature of the output head is [V, V] and is not computed; set head=False.")
    return dataclasses.replace(gradients, reduction="sum")


def _as_moments(gradients: ExampleGradients, curvature: Curvature) -> Moments:
    """The curvature as a tree like the trainable parameters, in the place where features find their constants."""
    if gradients.target == "full":
        tree: Any = {"layers": {name: {"kernel": eigen} for name, eigen in curvature.items()}}
        empty: Any = {"layers": {name: {"kernel": None} for name in curvature}}
    else:
        names = {name.split(".")[0] for name in curvature}
        tree = {name: {part: curvature[f"{name}.{part}"] for part in ("a", "b")} for name in names}
        empty = {name: {"a": None, "b": None} for name in names}
    return Moments(tree, empty, jnp.zeros((), jnp.int32))


@dataclasses.dataclass(frozen=True)
class Eigenbasis:
    """The scale of a gradient that was turned into the eigenbasis; the rules below turn its factors."""

    name = "ekfac"
    needs_moments = True
    factored = False
    linear = True

    def prepare(self, first: Any, second: Any, count: Array) -> State:
        del second, count
        return State(first.values, (first.inputs, first.outputs))

    def factors(self, x: Array, d: Array, state: State) -> tuple[Array, Array]:
        inputs, outputs = state.whole
        return x.astype(jnp.float32) @ inputs, d.astype(jnp.float32) @ outputs

    def dense(self, gradient: Array, state: State) -> Array:
        return gradient * state.rows


@dataclasses.dataclass(frozen=True)
class WhitenedSketch(Sketch):
    """A projection of gradients in the eigenbasis, scaled there."""

    feature: Eigenbasis = Eigenbasis()

    def of_factors(self, name: str, context: Context, x: Array, d: Array) -> Array:
        # Turned first: blocks of rows of the gradient are then blocks of the eigenbasis.
        return super(Sketch, self).of_factors(name, context, *self.feature.factors(x, d, context.state))


@dataclasses.dataclass(frozen=True)
class _Sums:
    """Rules that add up something of the size of a gradient over examples."""

    per_layer = True
    per_example = False
    feature: Feature = Gradient()

    def zeros(self, batch: int, rows: int, cols: int, targets: int) -> Array:
        del batch, targets
        return jnp.zeros((rows, cols), jnp.float32)

    def of_factors(self, name: str, context: Context, x: Array, d: Array) -> Array:
        raise NotImplementedError

    def of_blocks(self, name: str, context: Context, rows: int, cols: int, batch: int, source: Source) -> Array:
        raise ValueError("The curvature of the output head is [V, V] and is not computed; set head=False.")


@dataclasses.dataclass(frozen=True)
class EigenSquares(_Sums):
    """Sums over examples of the squares of their gradients in the eigenbasis."""

    feature: Feature = Eigenbasis()

    def of_factors(self, name: str, context: Context, x: Array, d: Array) -> Array:
        x, d = self.feature.factors(x, d, context.state)
        plan = blocks(x.shape[-1], d.shape[-1], x.shape[0], 1)
        rows, cols, count, number = plan
        padded = plan.pad(x, -1)

        def block(first: Array) -> Array:
            return jnp.sum(jnp.square(product(plan.take(padded, first, -1), d)), axis=0)

        found = jax.lax.map(block, jnp.arange(number) * count)
        return found.reshape(count * number, cols)[:rows]


@dataclasses.dataclass(frozen=True)
class Total(_Sums):
    """Sums over examples of their gradients."""

    def of_factors(self, name: str, context: Context, x: Array, d: Array) -> Array:
        return jax.lax.dot_general(x, d, (((0, 1), (0, 1)), ((), ())), preferred_element_type=jnp.float32)
