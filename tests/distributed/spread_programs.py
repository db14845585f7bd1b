"""What the library computes on meshes of virtual devices and on one of them, for `test_spread.py` to compare.

Run as `python spread_programs.py OUT MESH:PART ...`, a mesh being its sizes, as in `2,2,2:lora`, or the word `one`.
Writes arrays by name. One of several processes is told by the variable DUET_CLUSTER: HOST:PORT,N,I; the first writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pyarrow.parquet
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from duet_jax import config as configs
from duet_jax import models
from duet_jax._decode import decode
from duet_jax.config import (
    AXES,
    DataConfig,
    DomainConfig,
    LoraSettings,
    MeshConfig,
    OnlineConfig,
    SelectConfig,
    TrainingConfig,
)
from duet_jax.data import Domain, Encoded, Example, domains, encode, keeping, token_files
from duet_jax.data.characters import CharacterTokenizer
from duet_jax.distributed import processes
from duet_jax.distributed.mesh import make_mesh
from duet_jax.distributed.place import place, place_rows, readable
from duet_jax.errors import ConfigError, DataError, DuetError, StudyError
from duet_jax.feedback import Deployed, Engine
from duet_jax.feedback.harness.scoring import score_continuations
from duet_jax.influence.gradients import ExampleGradients
from duet_jax.influence.projections import CountSketch
from duet_jax.loading import load
from duet_jax.models import llama, slots
from duet_jax.models import lora as adapters
from duet_jax.models.sampling import Sampling
from duet_jax.reading import encode_all, load_all
from duet_jax.select import select
from duet_jax.storage import Shelf
from duet_jax.training.checkpoint import Checkpoints
from duet_jax.training.reports import StepReport
from duet_jax.training.sft import Trainer

TOKENIZER = CharacterTokenizer("abcdefghijklmnopqrstuvwxyz .,?!ABCDEFGHIJKLM")
MODEL = llama.LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
)
BATCH, LENGTH, EXAMPLES = 16, 12, 40
Found = dict[str, Any]


def mesh_of(text: str) -> Mesh | None:
    """The mesh of its sizes; of the word 'one', no mesh."""
    if text == "one":
        return None
    sizes = dict(zip(AXES, map(int, text.split(",")), strict=True))
    return make_mesh(MeshConfig(**sizes), jax.devices(), 0)


def params() -> llama.Params:
    return llama.init(MODEL, key=jax.random.key(3))


def data() -> Encoded:
    rng = np.random.default_rng(0)
    tokens = tuple(rng.integers(0, 40, n).astype(np.int32) for n in rng.integers(5, LENGTH + 1, EXAMPLES))
    return Encoded(tokens, np.full(EXAMPLES, 2, np.int32), tuple(map(str, range(EXAMPLES))))


def trainer(mesh: Mesh | None, **changes: Any) -> Trainer:
    lora = LoraSettings(rank=4, alpha=8.0, dropout=0.1)
    values = dict(batch_size=BATCH, learning_rate=1e-2, lora=lora, micro_batch_size=8, checkpoint_every=2) | changes
    return Trainer(MODEL, params, TrainingConfig(**values), (LENGTH,), 0, mesh=mesh)


def flat(tree: Any, prefix: str) -> Found:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {prefix + jax.tree_util.keystr(path): np.asarray(readable(leaf)) for path, leaf in leaves}


def largest_shard(tree: Any) -> float:
    """The most that one device holds of a tree, as a share of it."""
    sizes = {device: 0 for device in jax.devices()}
    leaves = jax.tree.leaves(tree)
    for leaf in leaves:
        for shard in leaf.addressable_shards:
            sizes[shard.device] += shard.data.size
    return max(sizes.values()) / sum(leaf.size for leaf in leaves)


def training(mesh: Mesh | None, folder: Path, method: str) -> Found:
    """Three steps with gradient accumulation; stopped after two of them and resumed, they end the same."""
    subject = trainer(mesh, method=method)
    losses: list[float] = []
    rows = np.arange(EXAMPLES)
    common = dict(seed=1, start_seed=0, fingerprint="f", folder=folder)
    trained = subject.fit(data(), rows, on_step=lambda report: losses.append(report.loss), **common)
    state = subject.start(jax.random.key(0))
    found = {"losses": np.array(losses), "share": largest_shard(state), "programs": subject.step._cache_size()}
    return found | flat(trained.trainable, "trained")


def chosen_online(mesh: Mesh | None) -> Found:
    """Four steps, each on half of its candidates; the last one of an epoch has fewer of them."""
    subject = trainer(mesh, online=OnlineConfig(candidates=2 * BATCH), epochs=2)
    reports: list[StepReport] = []
    reference = np.random.default_rng(2).uniform(5, 40, EXAMPLES).astype(np.float32)
    trained = subject.fit(
        data(), np.arange(EXAMPLES), seed=1, start_seed=0, on_step=reports.append, reference=reference
    )
    numbers = np.array([(report.loss, report.score) for report in reports])
    found = {"losses": numbers[:, 0], "score": numbers[:, 1], "programs": subject.step._cache_size()}
    # Of other examples there would be other numbers of tokens.
    return found | {"tokens": np.array([report.tokens for report in reports])} | flat(trained.trainable, "trained")


def restored(mesh: Mesh | None) -> Found:
    """What a training of any number of devices left, in the folder that DUET_TRAINED names."""
    with Checkpoints(Path(os.environ["DUET_TRAINED"]), {}) as checkpoints:
        found = checkpoints.restore(trainer(mesh).start(jax.random.key(9)))
    assert found is not None
    return {"step": found[0], "share": largest_shard(found[1])} | flat(found[1].trainable, "trained")


def shelved(mesh: Mesh | None) -> Found:
    """A state that a mesh leaves in an object store, and what others and one device find there."""
    from obstore.store import MemoryStore

    from duet_jax.storage.objects import Objects

    store = Objects(MemoryStore(), "memory")
    state = trainer(mesh).start(jax.random.key(9))
    with Checkpoints(Shelf(store, "c"), {}) as checkpoints:
        checkpoints.save(3, state, {})
    name, _, _ = max(store.listed("c")).rpartition("/")
    sizes = [len(store.read(part)[0]) for part in store.listed(name)]
    found = {"written": sum(sizes) / sum(leaf.nbytes for leaf in jax.tree.leaves(state))}
    for text in ("one", "1,8,1", "1,2,4", "8,1,1"):
        like = trainer(mesh_of(text)).start(jax.random.key(0))
        with Checkpoints(Shelf(store, "c"), {}) as checkpoints:
            _, other, _ = checkpoints.restore(like) or (0, like, {})
        found[f"kept {text}"] = all(
            np.array_equal(one, two) and two.sharding == three.sharding
            for one, two, three in zip(*map(jax.tree.leaves, (state, other, like)), strict=True)
        )
    return found


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Tokens and weights of sequences that predict different tokens."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, MODEL.vocab_size, (BATCH, LENGTH)).astype(np.int32)
    return tokens, (rng.random((BATCH, LENGTH)) > 0.4).astype(np.float32)


def sketches(mesh: Mesh | None, target: str, *, micro: int | None = None) -> Found:
    kind = ExampleGradients(MODEL, target=target, head=target == "full", micro_batch=micro, mesh=mesh)
    lora = adapters.init(MODEL, adapters.LoraConfig(rank=4), key=jax.random.key(5))
    factors = jax.tree.map(lambda x: x + 0.02, lora.factors)
    lora = None if target == "full" else adapters.Lora(factors, lora.scale)
    out = kind.sketch(CountSketch(256, 7))(params(), lora, *batch())
    share = largest_shard(out.values)
    values, losses = map(np.asarray, readable((out.values, out.losses)))
    return {"sketches": values, "losses": losses, "share": share}


def moments(mesh: Mesh | None) -> Found:
    """Second moments, sums over the examples of all devices.

    Those of queries and keys are left out: a position that attends to itself alone has no derivative there, or one of
    rounding, and counts or not.
    """
    kind = ExampleGradients(MODEL, target="full", mesh=mesh)
    found = kind.second_moments()(params(), None, *batch()).values
    return flat({name: sums for name, sums in found.items() if name not in ("q", "k")}, "moments")


def compiled_to_write() -> int:
    """Programs that admit prompts, and that write replies, of all meshes so far."""
    return slots.admit._cache_size() + slots.advance._cache_size()


def deployed(mesh: Mesh | None) -> Found:
    """Scores and sampled replies of an adapted model."""
    base = models.Model(MODEL, {}, TOKENIZER, "random", "f")
    engine = Engine(base, False, (LENGTH,), mesh=mesh)
    lora = adapters.init(MODEL, adapters.LoraConfig(rank=4), key=jax.random.key(5))
    lora = adapters.Lora(jax.tree.map(lambda x: x + 0.02, lora.factors), lora.scale)
    model = Deployed(engine, *place(mesh, (params(), lora)))
    examples = data()
    continuations = [
        (list(map(int, row[:3])), [*map(int, row[3:4]), choice]) for row in examples.tokens for choice in (5, 6)
    ]
    # Ten rows are rounded up to what the devices share.
    harness = np.array(score_continuations(model, continuations, 10))
    found, before = {"scores": model.log_probs(examples, 8), "harness": harness}, compiled_to_write()
    replies = model.sample(
        examples, Sampling(temperature=0.8, top_k=10), samples=2, max_new_tokens=6, batch_size=16, seed=0
    )
    return found | {"ids": replies.ids, "log_probs": replies.log_probs, "programs": compiled_to_write() - before}


def collectives(text: str) -> set[tuple[str, str]]:
    """Kind and shape of each collective in a compiled program's text, a shape as its sizes."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text)
    return {(kind, shape) for shapes, kind in found for shape in re.findall(r"\w+\[([\d,]*)\]", shapes)}


def hlo(mesh: Mesh | None) -> Found:
    """Collectives of a sketch with sizes that tell apart what is moved."""
    assert mesh is not None
    kind = ExampleGradients(MODEL, target="full", mesh=mesh)
    program = kind.sketch(CountSketch(256, 7))
    text = jax.jit(program).lower(place(mesh, params()), None, *place_rows(mesh, batch())).compile().as_text()
    return {"collectives": np.array(sorted(collectives(text)))}


def selection(mesh: Mesh | None, folder: Path, selector: dict[str, Any]) -> Found:
    """Chosen examples and their utilities, by a model of as many heads as `MODEL`."""
    walk = {"letters": 5, "length": 6, "examples": 40}
    domains = [{"name": tag, "source": "synthetic:walk", "options": {**walk, "tags": tag}} for tag in "AB"]
    heads = MODEL.num_kv_heads
    scratch = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 1, "num_heads": heads, "num_kv_heads": heads}
    tree = {
        "name": "walks",
        "count": 16,
        "data": {"max_length": 10, "buckets": [10], "validation_fraction": 0.2, "domains": domains},
        "model": {"scratch": scratch},
        "training": {"learning_rate": 0.01, "batch_size": 8, "lora": {"rank": 2}},
        "selector": {"rule": "top_k", "warmup_epochs": 1, **selector},
        "mesh": None if mesh is None else dict(mesh.shape),
    }
    devices = jax.devices()[:1] if mesh is None else jax.devices()
    with mock.patch.object(jax, "devices", lambda: devices):
        select(decode(SelectConfig, tree), folder, quiet=True)
    about = json.loads((folder / "selection.json").read_text())
    table = pyarrow.parquet.read_table(folder / "scores.parquet").to_pydict()
    return {
        "utility": np.array(table["utility"]),
        "selected": np.array(table["selected"]),
        "spread": any(line.startswith("mesh: ") for line in about["log"]),
    }


def choices() -> Found:
    """Meshes that are chosen, and what is said of those that cannot be."""
    gigabytes = 1 << 30
    sizes = [(1, 16), (8, 16), (9, 16), (17, 16), (400, 16), (400, None)]
    meshes = [
        make_mesh(None, jax.devices(), state * gigabytes, device_bytes=memory and memory * gigabytes)
        for state, memory in sizes
    ]
    said = []
    examples = tuple(Example(str(i), "ab", "cd") for i in range(8))
    data = configs.DataConfig(domains=(configs.DomainConfig(name="a", source="a"),), max_length=16, buckets=(16,))
    model = configs.ModelConfig(scratch=configs.ScratchConfig(hidden_size=16, num_layers=1, num_kv_heads=2))
    domains = [Domain("a", examples, (), "here")]
    for config, batch, micro in (
        (MeshConfig(), 12, None),
        (MeshConfig(data=4, fsdp=2), 16, 4),
        (MeshConfig(tensor=4), 8, None),
        (None, 12, None),
        (None, 9, None),
    ):
        training = TrainingConfig(learning_rate=0.1, batch_size=batch, micro_batch_size=micro)
        try:
            lines: list[str] = []
            loaded = load(model, data, training, domains, (), 0, lines.append, config, jax.devices())
            mesh, base = loaded.trainer.mesh, jax.tree.leaves(loaded.trainer.load_base())
            where = {(leaf.committed, *leaf.devices()) for leaf in base}
            line = next(line for line in lines if line.startswith("mesh: "))
            said.append(str(dict(mesh.shape)) if mesh is not None else f"{line} {where == {(True, jax.devices()[0])}}")
        except ConfigError as error:
            said.append(str(error))
    return {"sizes": np.array([tuple(mesh.shape.values()) for mesh in meshes]), "said": np.array(said)}


def wide(part: Callable[..., Found], *arguments: Any) -> Found:
    """A part with a model of eight heads, which as many devices may have one each of."""
    model = dataclasses.replace(MODEL, num_heads=8, num_kv_heads=8, head_dim=4)
    with mock.patch.dict(globals(), MODEL=model):
        return part(*arguments)


LESS = {"kind": "less", "k": 512}
PARTS = {
    "lora": lambda mesh, folder: training(mesh, folder, "lora"),
    "full": lambda mesh, folder: training(mesh, folder, "full"),
    "sketches": lambda mesh, folder: sketches(mesh, "lora"),
    "head": lambda mesh, folder: sketches(mesh, "full", micro=1),
    "moments": lambda mesh, folder: moments(mesh),
    "deployed": lambda mesh, folder: deployed(mesh),
    "hlo": lambda mesh, folder: hlo(mesh),
    "less": lambda mesh, folder: selection(mesh, folder, LESS),
    "ekfac": lambda mesh, folder: selection(mesh, folder, {"kind": "influence"}),
    "rho": lambda mesh, folder: chosen_online(mesh),
    "wide_lora": lambda mesh, folder: wide(training, mesh, folder, "lora"),
    "wide_sketches": lambda mesh, folder: wide(sketches, mesh, "lora"),
    "wide_less": lambda mesh, folder: wide(selection, mesh, folder, LESS),
    "choices": lambda mesh, folder: choices(),
    "shelved": lambda mesh, folder: shelved(mesh),
    "restored": lambda mesh, folder: restored(mesh),
    "told": lambda mesh, folder: told(mesh),
    "reads": lambda mesh, folder: reads(folder),
}


def told(mesh: Mesh | None) -> Found:
    """What the first process says to all, and what becomes of an error of it."""
    number = jax.process_index()
    long = processes.lead(lambda: "x" * 20_000 + str(number))
    nested = processes.lead(lambda: processes.lead(lambda: number) + 1)
    try:
        processes.lead(lambda: decode(MeshConfig, {"data": 0}))
    except ConfigError as error:
        said = str(error)
    with processes.led(lambda: contextlib.nullcontext(number)) as entered:
        heard = np.array([entered if entered is not None else -1])
    try:
        processes.require_shared(Path(__file__ if processes.first() else "nowhere"))
        missed = ""
    except StudyError as error:
        missed = str(error)
    try:
        processes.agree(StudyError("mine") if number == 1 else None, "read it")
        failed = ""
    except StudyError as error:
        failed = str(error)
    rows = np.arange(4 * jax.device_count(), dtype=np.float32)
    whole = np.asarray(readable(place_rows(mesh, rows) * 2))
    found = {"long": len(long), "last": long[-1], "nested": nested, "said": said, "missed": missed, "failed": failed}
    return found | {"entered": heard, "whole": whole}


class Counting(CharacterTokenizer):
    """Counts the prompts and responses it has been given, and refuses some."""

    given, refused = 0, ""

    def encode_batch(self, texts: Any) -> list[list[int]]:
        Counting.given += len(texts)
        if Counting.refused in texts:
            raise DataError(f"{Counting.refused} is refused")
        return super().encode_batch(texts)


def reads(folder: Path) -> Found:
    """Examples and tokens in a folder that all share, in one of each process's own, and of a process that fails."""
    number, parsed, found = jax.process_index(), 0, {}
    processes.lead(lambda: folder.mkdir(parents=True))
    lines = [json.dumps({"prompt": f"p {i}", "response": f"is {i}"}) for i in range(EXAMPLES)]
    processes.lead(lambda: (folder / "a.jsonl").write_text("\n".join(lines)))
    source = DataConfig(domains=(DomainConfig(name="a", source=str(folder / "a.jsonl")),), validation_fraction=0.25)

    def noted(spec: DomainConfig) -> Any:
        nonlocal parsed
        parsed += 1
        return domains.parsed(spec)

    def read(place: Path, max_length: int) -> str:
        (domain,) = load_all(source, 0, place)
        options = {"chat": False, "max_length": max_length, "folder": place}
        (tokens,) = encode_all([("a", domain.train)], Counting(TOKENIZER.alphabet), **options)
        same = encode(domain.train, TOKENIZER, chat=False, max_length=max_length).digest
        return "as in memory" if tokens.digest == same else "other tokens"

    with mock.patch.object(token_files, "PART", 4), mock.patch.object(keeping, "parsed", noted):
        for name, place in (("shared", folder), ("again", folder), ("own", folder / str(number))):
            Counting.given, parsed = 0, 0
            found[f"{name} tokens"] = read(place, 32)
            counts = multihost_utils.process_allgather(np.array([parsed, Counting.given]))
            found |= {f"{name} parsed": counts[:, 0], f"{name} given": counts[:, 1]}
        Counting.refused = "is 39" if number else ""
        try:
            found["failed"] = read(folder, 33)
        except DuetError as error:
            found["failed"] = str(error)
        said = multihost_utils.process_allgather(np.array("refused" in found["failed"]))
    return found | {"refused": said}


def main(out: str, *runs: str) -> None:
    processes.start(*cluster())
    found = {}
    for run in runs:
        mesh, part = run.split(":")
        arrays = PARTS[part](mesh_of(mesh), Path(out).with_suffix("") / f"{mesh}-{part}")
        found |= {f"{run} {key}": value for key, value in arrays.items()}
        print(f"{run}: {time.process_time():.0f} s of CPU so far", flush=True)
    if processes.first():
        np.savez(out, **found)


def cluster() -> tuple[Any, ...]:
    if "DUET_CLUSTER" not in os.environ:
        return ()
    address, count, number = os.environ["DUET_CLUSTER"].split(",")
    return address, int(count), int(number)


if __name__ == "__main__":
    main(*sys.argv[1:])
