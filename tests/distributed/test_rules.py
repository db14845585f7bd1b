"""Where arrays lie on a mesh, by the table of `rules`; nothing here needs more than one device."""

from __future__ import annotations

from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from duet_jax import config as configs
from duet_jax.config import AXES, MeshConfig, TrainingConfig
from duet_jax.data import Example
from duet_jax.data.domains import Domain
from duet_jax.distributed import rules
from duet_jax.distributed.mesh import make_mesh
from duet_jax.distributed.place import place, row_parts, spread
from duet_jax.errors import ConfigError
from duet_jax.loading import load
from duet_jax.models import llama
from duet_jax.models import lora as adapters
from duet_jax.models.decoding import unstack
from duet_jax.training.optimiser import adam

MODEL = llama.LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    qkv_bias=True,
    qk_norm=True,
    tie_embeddings=False,
)
EIGHT = AbstractMesh((2, 2, 2), AXES)


def specs(tree: Any, mesh: Any = EIGHT, **options: bool) -> dict[str, tuple]:
    found = rules.shardings(mesh, tree, **options)
    return {jax.tree_util.keystr(path): tuple(x.spec) for path, x in jax.tree_util.tree_leaves_with_path(found)}


def test_parameters_and_what_is_kept_for_them() -> None:
    found = specs(llama.shapes(MODEL))
    inwards, outwards = (None, "fsdp", "tensor"), (None, "tensor", "fsdp")
    for name in ("q", "k", "v", "gate", "up"):
        assert found[f"['layers']['{name}']['kernel']"] == inwards
    for name in ("o", "down"):
        assert found[f"['layers']['{name}']['kernel']"] == outwards
    assert found["['embedding']"] == found["['head']"] == ("tensor", "fsdp")
    assert found["['layers']['k']['bias']"] == (None, "tensor")
    assert {found[f"['layers']['{x}']"] for x in ("attention_norm", "q_norm")} | {found["['norm']"]} == {()}
    state = jax.eval_shape(lambda: adam(1.0, 0.0).init(llama.init(MODEL, key=jax.random.key(0))))
    of_state = specs(state)
    for path, spec in found.items():
        assert {x for name, x in of_state.items() if name.endswith(path)} == {spec}


def test_adapters_lie_with_the_features_of_their_kernels() -> None:
    lora = jax.eval_shape(lambda: adapters.init(MODEL, adapters.LoraConfig(rank=4), key=jax.random.key(0)))
    found = {name[-10:]: spec for name, spec in specs(lora).items()}
    inwards, outwards = ("fsdp", "tensor"), ("tensor", "fsdp")
    assert found["['q']['a']"] == (None, inwards) and found["['q']['b']"] == (None, None, outwards)
    factors = specs(lora.factors)
    assert factors["['down']['a']"] == (None, outwards) and factors["['down']['b']"] == (None, None, inwards)
    assert specs(lora.factors, gathered=True)["['down']['a']"] == (None, "tensor")


def test_a_decoder_that_writes_is_gathered_over_fsdp_alone() -> None:
    shapes = jax.eval_shape(lambda p: unstack(MODEL, p, None, "float32"), llama.shapes(MODEL))
    found = specs(shapes, gathered=True)
    assert found[".layers[1][0]['q']['kernel']"] == (None, "tensor") and found[".embedding"] == ("tensor",)
    assert specs(shapes)[".layers[1][0]['down']['kernel']"] == ("tensor", "fsdp")
    assert not any("fsdp" in spec for spec in found.values())


def test_what_does_not_divide_is_left_whole() -> None:
    mesh = AbstractMesh((1, 3, 8), AXES)
    found = specs(llama.shapes(MODEL), mesh)
    assert found["['layers']['q']['kernel']"] == (None, None, "tensor")
    assert found["['layers']['k']['bias']"] == (None, "tensor")
    assert specs(llama.shapes(MODEL), AbstractMesh((1, 5, 3), AXES))["['layers']['up']['kernel']"] == ()
    assert specs(llama.shapes(MODEL), AbstractMesh((4,), ("data",)))["['embedding']"] == ()


@pytest.mark.parametrize(
    ("rows", "spec"), [(16, ("data", "fsdp")), (8, ("data", "fsdp")), (2, "data"), (6, "data"), (3, None)]
)
def test_rows_go_over_the_axes_that_divide_them(rows: int, spec: Any) -> None:
    mesh = AbstractMesh((2, 4, 2), AXES)
    assert rules.row_spec(mesh, rows) == (PartitionSpec() if spec is None else PartitionSpec(spec))
    assert row_parts(mesh) == 8 and row_parts(None) == 1
    assert rules.row_spec(mesh, 16, axes=rules.ALL_ROWS) == PartitionSpec(rules.ALL_ROWS)
    assert rules.row_spec(mesh, 16, at=1) == PartitionSpec(None, ("data", "fsdp"))
    assert rules.cache_spec(mesh, 8, 2) == PartitionSpec(("data", "fsdp"), "tensor")
    assert rules.cache_spec(mesh, 8, 3) == PartitionSpec(("data", "fsdp"))


def test_without_a_mesh_nothing_is_moved() -> None:
    tree = {"kernel": jax.numpy.ones(3)}
    assert place(None, tree) is tree and spread(None, tree) is tree


def test_axes_that_are_not_left_to_the_compiler_are_refused() -> None:
    explicit = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Explicit,))
    with pytest.raises(ValueError, match="all must be Auto"):
        place(explicit, {})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 0}, "data is 0; it must be at least 1, or -1 for the devices that are left"),
        ({"data": -1, "tensor": -1}, "tensor is -1, as is data; only one axis can have the devices that are left"),
    ],
)
def test_sizes_of_a_mesh_are_checked(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MeshConfig(**sizes)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 2}, "mesh: data 2 x fsdp 1 x tensor 1 is 2; it must be the number of devices, 1"),
        ({"tensor": 3}, "mesh: fsdp 1 x tensor 3 is 3; it must divide the number of devices, 1"),
    ],
)
def test_a_mesh_is_made_of_all_devices(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_mesh(MeshConfig(**sizes), jax.devices()[:1], 0)
    assert dict(make_mesh(MeshConfig(), jax.devices()[:1], 0).shape) == {"data": 1, "fsdp": 1, "tensor": 1}


def test_one_device_has_no_mesh() -> None:
    """Asked for or not: nothing of its programs is another than without one."""
    examples = tuple(Example(str(i), "ab", "cd") for i in range(8))
    domain = Domain("a", examples, (), "here")
    model = configs.ModelConfig(scratch=configs.ScratchConfig(hidden_size=16, num_layers=1))
    data = configs.DataConfig(domains=(configs.DomainConfig(name="a", source="a"),), max_length=16, buckets=(16,))
    for mesh in (None, MeshConfig()):
        training = TrainingConfig(learning_rate=0.1)
        loaded = load(model, data, training, [domain], (), 0, lambda line: None, mesh, jax.devices()[:1])
        assert loaded.trainer.mesh is None and loaded.engine.mesh is None
