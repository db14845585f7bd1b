"""Sketches of whole data sets: examples in batches of a few lengths, through one compiled pass, into a store."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from duet_jax.data import Encoded, gather_batch, plan_batches
from duet_jax.distributed.place import held_rows, readable
from duet_jax.distributed.processes import first, lead, stop_if_told
from duet_jax.influence import accuracy
from duet_jax.influence.features import Feature, Moments
from duet_jax.influence.gradients import PLAIN, ExampleGradients, Examples
from duet_jax.influence.header import Header
from duet_jax.influence.kfac import total_gradient
from duet_jax.influence.projections import CountSketch, KroneckerSketch, Rademacher
from duet_jax.influence.quantise import RowFormat
from duet_jax.influence.store import Store
from duet_jax.models import fingerprint
from duet_jax.models.llama import Params, frozen
from duet_jax.models.lora import Lora

# Pairs whose exact inner products are compared with sketched ones, and bytes that the targets' gradients may take.
SAMPLED, TARGETS, TARGET_BYTES = 24, 8, 1 << 30

Progress = Callable[[int, int], None]
# Projections of all parameters into one row of fixed width.
Shared = CountSketch | Rademacher | KroneckerSketch
PROJECTION = CountSketch()


def silent(done: int, of: int) -> None:
    """Progress that nobody sees."""


class Batching(NamedTuple):
    """Shapes of batches.

    Attributes:
      buckets: lengths that batches are padded to; one program is compiled for each.
      size: examples a batch; a multiple of the devices that share it.
      pad_id: id of padding.
    """

    buckets: tuple[int, ...]
    size: int
    pad_id: int

    def batches(
        self, data: Encoded, rows: np.ndarray, mesh: Mesh | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Some rows of the data: their numbers `[n]`, tokens int32 `[size, T]` and weights float32 `[size, T]`.

        The last batch of a length may hold fewer examples than `size`; the rest has no weight. With the mesh of a
        program that places its rows, the others than this process's own are not read.
        """
        for length, chosen in plan_batches(data.lengths[rows], self.buckets, self.size):
            batch = gather_batch(data, rows[chosen], length, self.size, self.pad_id, held_rows(mesh, self.size))
            yield rows[chosen], batch.tokens, batch.loss_mask.astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
    """Gradients at one point of a training.

    Attributes:
      gradients: which.
      params: of the decoder.
      lora: its adapters, or None.
      moments: Adam's state there, for features that need it, or None.
      model: fingerprint of the base model.
    """

    gradients: ExampleGradients
    params: Params
    lora: Lora | None
    moments: Moments | None = None
    model: str = ""

    def each(
        self,
        program: Callable[..., Examples],
        data: Encoded,
        rows: np.ndarray,
        batching: Batching,
        on_batch: Callable[[int], None] = lambda count: None,
        *,
        targets: Any = None,
    ) -> np.ndarray:
        """What a program makes of each example: float32 `[n, ...]`, in the order of `rows`.

        The device computes a batch while the host takes the one before.
        """
        place = np.empty(len(data), np.int64)
        place[rows] = np.arange(len(rows))
        found: np.ndarray | None = None
        waiting: tuple[np.ndarray, Array] | None = None

        def take(chosen: np.ndarray, values: Array) -> None:
            nonlocal found
            here = np.asarray(values)[: len(chosen)]
            found = np.empty((len(rows), *here.shape[1:]), here.dtype) if found is None else found
            found[place[chosen]] = here
            on_batch(len(chosen))

        params = frozen(self.params, self.gradients.compute_dtype)
        for chosen, tokens, weights in batching.batches(data, rows, self.gradients.mesh):
            values = readable(program(params, self.lora, tokens, weights, moments=self.moments, targets=targets).values)
            stop_if_told()
            if waiting is not None:
                take(*waiting)
            waiting = chosen, values
        if waiting is not None:
            take(*waiting)
        assert found is not None, "there are no rows"
        return found

    def total(self, data: Encoded, batching: Batching) -> dict[str, Array]:
        """The mean over examples of their gradients, `{name: [L, rows, cols]}`."""
        program, total = total_gradient(self.gradients), None
        for _, tokens, weights in batching.batches(data, np.arange(len(data)), self.gradients.mesh):
            part = program(self.params, self.lora, tokens, weights).values
            total = part if total is None else jax.tree.map(jnp.add, total, part)
        return jax.tree.map(lambda x: x / len(data), total)


def header(
    point: Point, data: Encoded, projection: Shared, feature: Feature, template: str, row_format: RowFormat, size: int
) -> Header:
    """What a store of these sketches says of itself."""
    gradients = point.gradients
    parts = f"{gradients.target}{', head' if gradients.head else ''}"
    lora = point.lora
    adapter = "" if lora is None else fingerprint(np.asarray(readable(lora.scale)).tolist(), readable(lora.factors))
    return Header(
        scheme=f"{projection!r} of {parts}",
        seed=projection.seed,
        k=projection.k,
        feature=feature.name,
        loss=gradients.reduction,
        rows=len(data),
        model=point.model or fingerprint(gradients.config, readable(point.params)),
        adapter=adapter,
        data=data.digest,
        template=template,
        optimiser="" if not feature.needs_moments else fingerprint("moments", readable(point.moments)),
        compute_dtype=str(jnp.dtype(gradients.compute_dtype)),
        format=row_format,
        shard_size=size,
    )


def sketch(
    point: Point,
    data: Encoded,
    folder: Path,
    batching: Batching,
    *,
    projection: Shared = PROJECTION,
    feature: Feature = PLAIN,
    template: str = "",
    row_format: RowFormat = "int8",
    shard_size: int = 1024,
    on_progress: Progress = silent,
) -> Store:
    """Sketches the gradient of every example into a store, or goes on with the one in `folder`.

    A shard is encoded and written while the next one is computed. Whatever was written stays; a store that was begun
    for anything else is refused.

    Args:
      point: gradients of what.
      data: examples, of which there is at least one.
      folder: of the store.
      batching: shapes of batches.
      projection: of the gradients.
      feature: what is projected of them.
      template: hash of the prompt template, for the header.
      row_format: of the stored rows.
      shard_size: examples a shard.
      on_progress: is told examples done and of how many.

    Raises:
      DataError: the store in `folder` is of other examples, another model or other settings, or a gradient is not
        finite.
    """
    store = begun(folder, header(point, data, projection, feature, template, row_format, shard_size))
    program = point.gradients.sketch(projection, feature)
    missing = lead(store.missing)
    done = len(data) - sum(stop - start for start, stop in map(store.bounds, missing))
    on_progress(done, len(data))

    def count(examples: int) -> None:
        nonlocal done
        done += examples
        on_progress(done, len(data))

    writing: Future[None] | None = None

    def settle() -> None:
        if writing is not None:
            writing.result()

    with ThreadPoolExecutor(1) as writer:
        for shard in missing:
            rows = np.arange(*store.bounds(shard))
            found = point.each(program, data, rows, batching, count)
            lead(settle)
            ids, lengths = [data.ids[int(row)] for row in rows], data.lengths[rows]
            if first():
                writing = writer.submit(store.write, shard, found, ids=ids, lengths=lengths)
        lead(settle)
    return store


def is_finished(store: Store) -> bool:
    """Whether a store is finished, by the first of several processes."""
    return lead(lambda: store.finished)


def begun(folder: Path, about: Header) -> Store:
    """The store in `folder`, or a new one, which the first of several processes makes and writes."""
    lead(lambda: Store.resume(folder, about) and None)
    return Store.open(folder, about)


def measured_error(
    point: Point,
    train: tuple[Encoded, Store],
    targets: tuple[Encoded, Store],
    batching: Batching,
    *,
    feature: Feature = PLAIN,
    seed: int = 0,
) -> accuracy.SketchError:
    """Compares cosines of stored rows with exact ones, of some training examples and plain gradients of some targets.

    Args:
      point: that both stores were built at.
      train: training examples and their store, of `feature`.
      targets: target examples and their store, of plain gradients.
      batching: shapes of batches.
      feature: of the training rows.
      seed: of the sample.
    """
    rng = np.random.default_rng(seed)
    (data, store), (data_of_targets, store_of_targets) = train, targets
    rows = np.sort(rng.permutation(len(data))[:SAMPLED])
    single = batching._replace(size=1, buckets=batching.buckets[-1:])
    shape = jax.eval_shape(lambda: point.gradients.named(point.params if point.lora is None else point.lora.factors))
    bytes_each = 4 * sum(x.size for x in jax.tree.leaves(shape))
    most = max(1, min(TARGETS, TARGET_BYTES // bytes_each))
    chosen = np.sort(rng.permutation(len(data_of_targets))[:most])
    program = total_gradient(point.gradients)
    gradients = [
        program(point.params, point.lora, tokens, weights).values
        for row in chosen
        for _, tokens, weights in single.batches(data_of_targets, np.array([row]))
    ]
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *gradients)
    products = point.each(point.gradients.inner_products(feature), data, rows, batching, targets=stacked)
    squares = point.each(point.gradients.squared_norms(feature), data, rows, batching)
    lengths = np.sqrt([sum(float(jnp.sum(jnp.square(x))) for x in each.values()) for each in gradients])
    exact = accuracy.cosines(products, np.sqrt(squares), lengths)
    ours, theirs = store.take(rows), store_of_targets.take(chosen)
    sketched = accuracy.cosines(ours @ theirs.T, np.linalg.norm(ours, axis=1), np.linalg.norm(theirs, axis=1))
    return accuracy.sketch_error(exact, sketched, store.header.k, seed=seed)
