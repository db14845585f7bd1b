"""Per-example gradients of a decoder, never stored: sketches, norms, inner products and second moments of them.

One ordinary batched backward pass for all examples of a batch, through the taps of `tap` and `head`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from duet_jax.distributed import rules
from duet_jax.distributed.place import map_rows, place, place_copied, place_rows, spread
from duet_jax.influence.features import Feature, Gradient, Moments, State
from duet_jax.influence.head import sequence_losses
from duet_jax.influence.projections import Projection
from duet_jax.influence.spread import Spread
from duet_jax.influence.tap import Context, InnerProducts, Rule, SecondMoments, Sketch, SquaredNorm, tap
from duet_jax.models import llama
from duet_jax.models.linear import Taps
from duet_jax.models.lora import TARGETS, Lora

HEAD = "head"
PLAIN = Gradient()
CHUNK = 256  # tokens that meet the vocabulary at a time


class Examples(NamedTuple):
    """What one pass over a batch found.

    Attributes:
      values: float32 `[B, k]` of sketches, `[B]` of squared norms, `[B, Q]` of inner products; for second moments,
        `{name: {"x": [L, in, in], "d": [L, out, out], "tokens": [L]}}`, summed over the batch.
      losses: float32 `[B]`, in nats: of each example.
    """

    values: Any
    losses: Array


@dataclasses.dataclass(frozen=True)
class ExampleGradients:
    """Which gradients of a decoder are looked at, and how they are computed.

    The loss of an example is the weighted sum of its tokens' cross-entropies, over the sum of the weights under
    `reduction="mean"`. Its gradient is that of the adapters' factors, or of the kernels of all linear layers, and
    with `head` also that of the output head as such: where input and output share one matrix, what the embedding of
    the input adds is not part of it. Embeddings, norms and biases have no part either.

    Every method returns a compiled function

        `(params, lora, tokens, weights, *, labels=None, moments=None, targets=None) -> Examples`

    with `params` and `lora` as for `llama.hidden_states`, tokens int32 `[B, T]` padded on the right, weights float32
    `[B, T]` (what the prediction of each token counts; 0 at t = 0), labels int32 `[B, T]` where the tokens to predict
    are not the input (`labels[t]` from the tokens before t), moments for features that need them, and `targets` for
    inner products, `{name: [Q, L, rows, cols]}` with the names of `named`.

    Attributes:
      config: of the decoder.
      target: gradients of LoRA factors or of all linear layers.
      head: the output head too.
      reduction: of an example's token losses.
      compute_dtype: dtype of the factors of all products, which accumulate in float32.
      remat: what the backward pass computes again, see `llama.hidden_states`.
      micro_batch: examples that are computed at a time, on each device that has its own; None for all.
      mesh: of `distributed.mesh`; parameters, moments and examples are put on it by `distributed.rules` (in every
        call, unless they are there already), targets are copied to every device. Gradients of examples are never
        moved: values of examples come out on the devices that computed them. None for one device.
    """

    config: llama.LlamaConfig
    target: Literal["lora", "full"] = "lora"
    head: bool = False
    reduction: Literal["sum", "mean"] = "mean"
    compute_dtype: Any = jnp.float32
    remat: llama.Remat = "products"
    micro_batch: int | None = None
    mesh: Mesh | None = None

    def sketch(self, projection: Projection, feature: Feature = PLAIN) -> Callable[..., Examples]:
        """Projections of each example's gradient or feature, float32 `[B, k]`.

        A projection that keeps parameters apart gives them in the order of their sorted names, layers within.
        """
        return program_of(self, Sketch(projection, feature))

    def squared_norms(self, feature: Feature = PLAIN) -> Callable[..., Examples]:
        """Exact squared norms, float32 `[B]`."""
        return program_of(self, SquaredNorm(feature))

    def inner_products(self, feature: Feature = PLAIN) -> Callable[..., Examples]:
        """Exact inner products with the Q gradients of `targets`, float32 `[B, Q]`."""
        return program_of(self, InnerProducts(feature))

    def second_moments(self) -> Callable[..., Examples]:
        """Sums of `x x^T` and `d d^T` of every layer over the batch; of loss sums, whatever `reduction` is.

        Raises:
          ValueError: `head` is set.
        """
        if self.head:
            raise ValueError("The second moments of the output head are [V, V] and are not computed; set head=False.")
        return program_of(dataclasses.replace(self, reduction="sum"), SecondMoments())

    def named(self, tree: Any) -> dict[str, Array]:
        """Takes a tree like the trainable parameters apart: `{name: [L, rows, cols]}`, the head as `[1, V, D]`.

        Raises:
          ValueError: the tree should hold the head, but LoRA factors do not.
        """
        if self.target == "lora":
            if self.head:
                raise ValueError("A tree of LoRA factors has no output head; this needs head=False or target='full'.")
            return {f"{name}.{part}": array for name, pair in tree.items() for part, array in pair.items()}
        found = {name: tree["layers"][name]["kernel"] for name in TARGETS}
        return found | ({HEAD: llama.output_head(tree)[None]} if self.head else {})

    def _parameters(self, params: llama.Params, lora: Lora | None) -> dict[str, Array]:
        """What `named` gives of the parameters themselves, the head too."""
        if self.target == "full":
            return self.named(params)
        if lora is None or not lora.factors:
            raise ValueError("Gradients of LoRA factors were asked for, but no adapters were given; pass lora.")
        found = dataclasses.replace(self, head=False).named(lora.factors)
        return found | ({HEAD: llama.output_head(params)[None]} if self.head else {})

    def _backward(
        self,
        rule: Rule,
        params: llama.Params,
        lora: Lora | None,
        rows: tuple[Array, Array, Array],
        moments: Moments | None,
        targets: Mapping[str, Array] | None,
    ) -> Examples:
        """One backward pass over examples that fit into memory."""
        tokens, labels, weights = rows
        tapped = rule if self.mesh is None else Spread(rule, self.mesh)
        if self.reduction == "mean":
            weights = weights / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        parameters = self._parameters(params, lora)
        layers = contexts(rule, self.named, parameters, moments, targets)
        of_head = jax.tree.map(lambda x: x[0], layers.pop(HEAD, None))
        queries = 0 if targets is None else next(iter(targets.values())).shape[0]
        zeros = {
            name: rule.zeros(tokens.shape[0], array.shape[1], array.shape[2], queries)
            for name, array in parameters.items()
        }

        def losses(apart: dict[str, Any], total: Any) -> tuple[Array, Array]:
            def observe(name: str, layer: tuple[dict, dict], x: Array, y: Array) -> Array:
                here, own = layer
                return tap(tapped, name, own.get(name, total), here[name], x, y) if name in here else y

            hidden = llama.hidden_states(
                self.config,
                params,
                tokens,
                lora=lora,
                compute_dtype=self.compute_dtype,
                remat=self.remat,
                taps=Taps(observe, (layers, {name: zero for name, zero in apart.items() if name != HEAD})),
                mesh=self.mesh,
            )
            watched = rule if self.head else None
            accumulator = apart.get(HEAD, total) if self.head else None

            def of_rows(accumulator: Any, hidden: Array, labels: Array, weights: Array, head: Array, of: Any) -> Array:
                return sequence_losses(
                    watched, CHUNK, self.compute_dtype, accumulator, of, hidden, head, labels, weights
                )

            values = map_rows(
                self.mesh,
                of_rows,
                (accumulator, hidden[:, :-1], labels[:, 1:], weights[:, 1:]),
                (llama.output_head(params), of_head),
            )
            return jnp.sum(values), values

        if not rule.per_layer:
            (_, found), values = jax.grad(losses, argnums=(0, 1), has_aux=True)({}, next(iter(zeros.values())))
            return Examples(found, values)
        start = {
            name: zeros[name]
            if name == HEAD
            else jax.tree.map(lambda z, n=array.shape[0]: jnp.broadcast_to(z, (n, *z.shape)), zeros[name])
            for name, array in parameters.items()
        }
        found, values = jax.grad(losses, has_aux=True)(start, None)
        return Examples(_side_by_side(found) if rule.per_example else found, values)

    def _compile(self, rule: Rule) -> Callable[..., Examples]:
        @jax.jit
        def compiled(
            params: llama.Params,
            lora: Lora | None,
            tokens: Array,
            weights: Array,
            *,
            labels: Array | None = None,
            moments: Moments | None = None,
            targets: Mapping[str, Array] | None = None,
        ) -> Examples:
            params = llama.frozen(params, self.compute_dtype)

            def part(rows: tuple[Array, Array, Array]) -> Examples:
                return self._backward(rule, params, lora, rows, moments, targets)

            rows = tokens, tokens if labels is None else labels, jnp.asarray(weights, jnp.float32)
            found = _in_parts(part, rows, self.micro_batch, rule.per_example, self.mesh)
            losses = spread(self.mesh, found.losses, axes=rules.ALL_ROWS)
            if rule.per_example:
                return Examples(spread(self.mesh, found.values, axes=rules.ALL_ROWS), losses)
            return found._replace(losses=losses)

        if self.mesh is None:
            return compiled

        def placed(
            params: Any,
            lora: Any,
            tokens: Any,
            weights: Any,
            *,
            labels: Any = None,
            moments: Any = None,
            targets: Any = None,
        ) -> Examples:
            params, lora, moments = place(self.mesh, (params, lora, moments))
            tokens, weights, labels = place_rows(self.mesh, (tokens, weights, labels))
            targets = place_copied(self.mesh, targets)
            return compiled(params, lora, tokens, weights, labels=labels, moments=moments, targets=targets)

        return placed


@lru_cache(maxsize=64)
def program_of(gradients: ExampleGradients, rule: Rule) -> Callable[..., Examples]:
    """The program of a rule: one for all checkpoints and calls."""
    return gradients._compile(rule)


def contexts(
    rule: Rule,
    named: Callable[[Any], Mapping[str, Array]],
    parameters: Mapping[str, Array],
    moments: Moments | None,
    targets: Mapping[str, Array] | None,
) -> dict[str, Context]:
    """Contexts of all parameters `[L, rows, cols]`, stacked over layers.

    Raises:
      ValueError: moments or targets that the rule needs are missing.
    """
    if rule.feature.needs_moments and moments is None:
        raise ValueError(f"The feature '{rule.feature.name}' needs the optimiser's moments; pass moments.")
    if isinstance(rule, InnerProducts) and (targets is None or set(targets) != set(parameters)):
        raise ValueError(f"Inner products need targets for exactly the parameters {', '.join(sorted(parameters))}.")
    first, second = ({}, {}) if moments is None else (named(moments.first), named(moments.second))
    found = {}
    for name, array in parameters.items():
        state = State()
        if moments is not None and rule.feature.needs_moments:
            state = jax.vmap(rule.feature.prepare, in_axes=(0, 0, None))(first[name], second[name], moments.steps)
        target = None if targets is None else jnp.moveaxis(targets[name], 1, 0)
        found[name] = Context(jnp.arange(array.shape[0]), state, target)
    return found


def _side_by_side(found: dict[str, Array]) -> Array:
    """One array `[B, width]` of what layers `[L, B, width]` and the head `[B, width]` gave."""
    apart = [x if name == HEAD else jnp.moveaxis(x, 0, 1) for name, x in sorted(found.items())]
    return jnp.concatenate([x.reshape(x.shape[0], -1) for x in apart], axis=1)


def _in_parts(
    part: Callable[[tuple], Examples],
    rows: tuple[Array, Array, Array],
    size: int | None,
    per_example: bool,
    mesh: Mesh | None,
) -> Examples:
    """Runs `part` on `size` rows of each device at a time; values of examples are put together again, sums added."""
    count = rows[0].shape[0]
    shards = 1 if mesh is None else rules.row_count(mesh, count)
    if size is None or size * shards >= count:
        return part(rows)
    if count % (size * shards):
        where = "" if shards == 1 else f" on each of {shards} devices"
        raise ValueError(f"A batch of {count} examples does not split into micro-batches of {size}{where}.")
    number = count // (size * shards)

    def split(x: Array) -> Array:
        # Every part has rows of all devices, which so stay where they are.
        return x.reshape(shards, number, size, *x.shape[1:]).swapaxes(0, 1).reshape(number, -1, *x.shape[1:])

    def join(x: Array) -> Array:
        return x.reshape(number, shards, size, *x.shape[2:]).swapaxes(0, 1).reshape(count, *x.shape[2:])

    parts = spread(mesh, jax.tree.map(split, rows), at=1)
    if per_example:
        return jax.tree.map(join, jax.lax.map(part, parts))

    def add(total: Any, rows: tuple) -> tuple[Any, Array]:
        values, losses = part(rows)
        return jax.tree.map(jnp.add, total, values), losses

    shapes = jax.eval_shape(part, jax.tree.map(lambda x: x[0], parts)).values
    total, losses = jax.lax.scan(add, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), parts)
    return Examples(total, join(losses))
