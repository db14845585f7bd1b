"""Every mistake is one sentence with the field's dotted path; what is dumped loads back equal."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from duet_jax import config as configs
from duet_jax.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SMALLEST: dict[str, Any] = {
    "name": "small",
    "budget": 16,
    "rounds": 2,
    "model": {"scratch": {}},
    "data": {"domains": [{"name": "a", "source": "a.jsonl"}, {"name": "b", "source": "b.jsonl"}]},
    "training": {"learning_rate": 0.001},
    "task": {"kind": "response_loss", "source": "test.jsonl"},
}


def changed(*assignments: str) -> configs.StudyConfig:
    return configs.loads(yaml.safe_dump(SMALLEST), assignments)


def test_defaults() -> None:
    config = configs.from_dict(SMALLEST)
    assert config.data.buckets == (64, 128, 256)
    assert config.task.split == "test" and config.data.domains[0].split == "train"
    assert config.training.lora.targets == ("q", "k", "v", "o", "gate", "up", "down")
    assert config.model.remat == "products" and config.selector.kind == "random"


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("trainin.epochs=1", "trainin is not a field; did you mean training?"),
        ("training.epocs=1", "training.epocs is not a field; did you mean training.epochs?"),
        ("training.lora.rnak=1", "training.lora.rnak is not a field; did you mean training.lora.rank?"),
        ("feedback.zzz=1", "feedback.zzz is not a field; the fields here are stars, low, high, noise."),
        ("data.domains.1.sorce=x", "data.domains.1.sorce is not a field; did you mean data.domains.1.source?"),
        ("data.domains.2.name=x", "data.domains.2.name does not exist: '2' is no number from 0 to 1."),
        ("budget.much=3", "budget.much does not exist: 16 has no field 'much'."),
        ("epochs", "the override 'epochs' must be of the form key.sub=value."),
        ("budget=many", "budget is 'many'; it must be a whole number."),
        ("budget=1.5", "budget is 1.5; it must be a whole number."),
        ("budget=true", "budget is True; it must be a whole number."),
        ("budget=null", "budget is None; it must be a whole number."),
        ("name=7", "name is 7; it must be a text."),
        ("model.chat=maybe", "model.chat is 'maybe'; it must be true or false."),
        ("training.learning_rate=fast", "training.learning_rate is 'fast'; it must be a finite number."),
        ("training.learning_rate=.inf", "training.learning_rate is inf; it must be a finite number."),
        ("data.buckets=64", "data.buckets is 64; it must be a list."),
        ("data.buckets=[64, x]", "data.buckets.1 is 'x'; it must be a whole number."),
        ("data.domains.0.options=3", "data.domains.0.options is 3; it must be a mapping of names to values."),
        (
            "search=3",
            "search is 3; it must be a mapping with acquisition, beta, schedule, floor, most, initial, settings, "
            "fidelity, groups, repetition, prior, penalty.",
        ),
        (
            "training.method=lorra",
            "training.method is 'lorra'; it must be one of lora, full; did you mean 'lora'?",
        ),
        ("model.dtype=int4", "model.dtype is 'int4'; it must be one of float32, bfloat16."),
        ("training.lora.targets=[q, x]", "training.lora.targets.1 is 'x'; it must be one of q, k, v,"),
        ("name=../x", "name is '../x'; it must be letters, digits, points, dashes and underscores."),
        ("seed=-1", "seed is -1; it must be from 0 to 2147483647."),
        ("budget=0", "budget is 0; it must be at least 1."),
        ("rounds=0", "rounds is 0; it must be at least 1."),
        ("model.source=m.gguf", "model.source or scratch must describe the model, exactly one of them; both"),
        ("model.scratch=null", "model.source or scratch must describe the model, exactly one of them; neither"),
        ("model.scratch.num_layers=0", "model.scratch.num_layers is 0; it must be at least 1."),
        ("model.scratch.hidden_size=60", "model.scratch.hidden_size is 60; it must be a multiple of 2 x num"),
        ("model.scratch.num_kv_heads=3", "model.scratch.num_kv_heads is 3; it must be a divisor of num_heads"),
        ("data.domains=[]", "data.domains is []; it must be a list of at least two domains, or of one with"),
        ("data.domains=[{name: a, source: b}]", "data.domains is ['a']; it must be a list of at least two"),
        ("data.domains.1.name=a", "data.domains.1.name is 'a' a second time; every domain needs its own."),
        ('data.domains.0.name=" "', "data.domains.0.name is ' '; it must be a name on one line."),
        ('data.domains.0.name="a\\nb"', "data.domains.0.name is 'a\\nb'; it must be a name on one line."),
        ('data.domains.0.source=""', "data.domains.0.source is ''; it must be a text that is not empty."),
        ("data.domains.0.max_examples=0", "data.domains.0.max_examples is 0; it must be at least 1."),
        ("data.domains.0.options={noise: 1}", "data.domains.0.options are for synthetic data, but the source"),
        ("data.validation_fraction=1", "data.validation_fraction is 1.0; it must be in [0, 1)."),
        ("data.validation_examples=-1", "data.validation_examples is -1; it must be at least 0."),
        ("data.max_length=1", "data.max_length is 1; it must be at least 2."),
        ("data.buckets=[128, 64, 256]", "data.buckets is [128, 64, 256]; it must be ascending lengths from 2."),
        ("data.buckets=[64, 64, 256]", "data.buckets is [64, 64, 256]; it must be ascending lengths from 2."),
        ("data.buckets=[64]", "data.buckets is [64]; it must be a list that ends with max_length (256)."),
        ("training.learning_rate=0", "training.learning_rate is 0.0; it must be greater than 0."),
        ("training.epochs=0", "training.epochs is 0; it must be at least 1."),
        (
            "training.micro_batch_size=3",
            "training.micro_batch_size is 3; it must be a divisor of batch_size",
        ),
        (
            "training.micro_batch_size=0",
            "training.micro_batch_size is 0; it must be a divisor of batch_size",
        ),
        ("training.warmup_fraction=2", "training.warmup_fraction is 2.0; it must be in [0, 1]."),
        ("training.weight_decay=-1", "training.weight_decay is -1.0; it must be at least 0."),
        ("training.clip_norm=0", "training.clip_norm is 0.0; it must be greater than 0."),
        ("training.checkpoint_every=0", "training.checkpoint_every is 0; it must be at least 1."),
        ("training.lora.rank=0", "training.lora.rank is 0; it must be at least 1."),
        ("training.lora.alpha=0", "training.lora.alpha is 0.0; it must be greater than 0."),
        ("training.lora.dropout=1", "training.lora.dropout is 1.0; it must be in [0, 1)."),
        ("training.lora.targets=[]", "training.lora.targets is []; it must be a list of at least one,"),
        ("training.lora.layers=[1, 1]", "training.lora.layers is [1, 1]; it must be a list of at least one,"),
        (
            "training.lora.layers=[-1]",
            "training.lora.layers is [-1]; it must be a list of layer numbers",
        ),
        ("task.kind=summ", "task.kind is 'summ'; it must be one of response_loss, perplexity,"),
        ("task.source=null", "task.source is missing; a task of kind 'response_loss' needs it."),
        ("task.function=m:f", "task.function has no meaning for a task of kind 'response_loss'; leave it out."),
        ("task.normalisation=length", "task.normalisation has no meaning for a task of kind 'response_loss'"),
        ("task.max_new_tokens=5", "task.max_new_tokens has no meaning for a task of kind 'response_loss'"),
        (
            "task.response=null",
            "task.response is null, but only a task of kind 'reward' can do without responses; name",
        ),
        (
            "data.domains.1.response=null",
            "data.domains.1.response is null, but responses are read here; name the column.",
        ),
        ("task.batch_size=0", "task.batch_size is 0; it must be at least 1."),
        ("task={kind: sum}", "task.tasks is missing; a task of kind 'sum' needs it."),
        ("task={kind: python}", "task.function is missing; a task of kind 'python' needs it."),
        ("task={kind: python, function: f}", "task.function is 'f'; it must be of the form module:callable."),
        ("task={kind: command}", "task.command is missing; a task of kind 'command' needs it."),
        ("task={kind: external, source: x}", "task.source has no meaning for a task of kind 'external'"),
        ("task={kind: sum, tasks: [{weight: 1}]}", "task.tasks.0.task is missing; it has no default."),
        (
            "task={kind: sum, tasks: [{weight: 0, task: {kind: perplexity, source: x}}]}",
            "task.tasks.0.weight is 0.0; it must be a number other than 0.",
        ),
        (
            "task={kind: sum, tasks: [{weight: 1, task: {kind: perplexity, sorce: x}}]}",
            "task.tasks.0.task.sorce is not a field; did you mean task.tasks.0.task.source?",
        ),
        (
            "task={kind: sum, tasks: [{weight: 1, task: {kind: external}}]}",
            "task.tasks.0.task.kind is 'external'; the parts of a sum must be built-in tasks.",
        ),
        ("feedback.stars=1", "feedback.stars is 1; it must be at least 2."),
        ("feedback.noise=-1", "feedback.noise is -1.0; it must be at least 0."),
        ("feedback.low=2", "feedback.high is 1.0; it must be greater than low (2.0)."),
        ("search.beta=-1", "search.beta is -1.0; it must be at least 0."),
        ("search.initial=0", "search.initial is 0; it must be at least 1."),
        ("search.most=0", "search.most is 0; it must be at least 1."),
        ("data.domains.0.minimum=1.5", "data.domains.0.minimum is 1.5; it must be a share, from 0 to 1."),
        (
            "data.domains.1={name: b, source: x, minimum: 0.5, maximum: 0.4}",
            "data.domains.1.maximum is 0.4; it must be from the minimum to 1.",
        ),
        ("search.floor=1", "search.floor is 1.0; it must be in [0, 1)."),
        (
            "search.floor=0.5",
            "search.floor is 0.5; it must be below 0.5, the share of each of 2 domains",
        ),
        ("search.repetition=0", "search.repetition is 0.0; it must be greater than 0."),
        ("search.penalty=-1", "search.penalty is -1.0; it must be at least 0."),
        ("search.penalty=1", "search.prior is missing; search.penalty has no meaning without it."),
        ("search.prior={a: 1.0}", "search.penalty is missing; search.prior has no meaning without it."),
        ("search={penalty: 1, prior: {a: 1, c: 0}}", "search.prior is 'c'; it must be shares of a, b."),
        ("search={penalty: 1, prior: {a: 0.5}}", "search.prior is 'shares that sum to 0.5'; it must be shares of sum"),
        ("search={penalty: 1, prior: {a: yes}}", "search.prior.a is True; it must be a share, from 0 to 1."),
        ("search.groups=[{domains: [a, c]}]", "search.groups.0.domains.1 is 'c'; it must be one of a, b."),
        ("search.groups=[{domains: []}]", "search.groups.0.domains is []; it must be a list of at least one"),
        ("search.groups=[{domains: [a, a]}]", "search.groups.0.domains is ['a', 'a']; it must be a list of at least"),
        (
            "search.groups=[{domains: [a]}, {domains: [b, a]}]",
            "search.groups.1.domains.1 is 'a', which is in groups.0 too.",
        ),
        ("search.groups=[{domains: [a], minimum: 2}]", "search.groups.0.minimum is 2.0; it must be a share, from 0 to"),
        (
            "search.groups=[{domains: [a], minimum: 0.5, maximum: 0.4}]",
            "search.groups.0.maximum is 0.4; it must be from the minimum to 1.",
        ),
        (
            "search.fidelity={field: budget, levels: [16]}",
            "search.fidelity.levels is [16]; it must be at least two whole numbers, ascending from at least 1.",
        ),
        ("search.fidelity={field: budget, levels: [0, 16]}", "search.fidelity.levels is [0, 16]; it must be at least"),
        ("search.fidelity={field: budget, levels: [8, 4, 16]}", "search.fidelity.levels is [8, 4, 16]; it must be at"),
        (
            "search.fidelity={field: budget, levels: [4, 8]}",
            "search.fidelity.levels is [4, 8]; it must be a list that ends with budget (16).",
        ),
        (
            "search.fidelity={field: training.epochs, levels: [1, 2]}",
            "search.fidelity.levels is [1, 2]; it must be a list that ends with training.epochs (1).",
        ),
        (
            "search.fidelity={field: budget, levels: [4, 16], costs: [1]}",
            "search.fidelity.costs is [1.0]; it must be a number greater than 0 for each level.",
        ),
        ("search.fidelity={field: rounds, levels: [1, 2]}", "search.fidelity.field is 'rounds'; it must be one of"),
        ("selector.kind=utilities", "selector.path is missing; a selector of kind 'utilities' needs the file"),
        ("selector.path=u.npy", "selector.path has no meaning for a selector of kind 'random'; leave it out."),
        ("selector.rule=top_k", "selector.rule has no meaning for a selector of kind 'random'; leave it out."),
        ("selector={kind: utilities, path: u, fraction: 1}", "selector.fraction is 1.0; it must be in [0, 1)."),
        ("name=${DUET_UNSET}", "name is '${DUET_UNSET}', but the environment variable DUET_UNSET is not set"),
        ("budget=[", "the text is not valid YAML in line 1: "),
    ],
)
def test_a_mistake_is_one_sentence_about_its_field(
    assignment: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DUET_UNSET", raising=False)
    with pytest.raises(ConfigError) as caught:
        changed(assignment)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value) and str(caught.value).endswith((".", "?"))


def test_missing_fields() -> None:
    for path in ("budget", "model", "task.kind", "training.learning_rate", "data.domains"):
        tree = copy.deepcopy(SMALLEST)
        *above, last = path.split(".")
        part = tree
        for name in above:
            part = part[name]
        del part[last]
        with pytest.raises(ConfigError, match=rf"^{path} is missing; it has no default\.$"):
            configs.from_dict(tree)


@pytest.mark.parametrize("text", ["", "3", "[a]"])
def test_a_file_must_be_a_mapping(text: str) -> None:
    with pytest.raises(ConfigError, match="^the file is .*; it must be a mapping with name, seed,"):
        configs.loads(text)


def test_a_name_given_twice_is_an_error() -> None:
    with pytest.raises(ConfigError, match="not valid YAML in line 2: 'seed' is given twice"):
        configs.loads("seed: 1\nseed: 2\n")


def test_errors_of_a_file_begin_with_its_path(tmp_path: Any) -> None:
    path = tmp_path / "study.yaml"
    with pytest.raises(ConfigError, match="study.yaml cannot be read: No such file or directory"):
        configs.load(path)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="study.yaml cannot be read: it is not a text in UTF-8"):
        configs.load(path)
    path.write_text(yaml.safe_dump({**SMALLEST, "budget": 0}))
    with pytest.raises(ConfigError, match=r"study.yaml: budget is 0; it must be at least 1\."):
        configs.load(path)


def test_numbers_as_yaml_reads_them() -> None:
    assert changed("training.learning_rate=1e-3").training.learning_rate == 0.001
    learning_rate = changed("training.learning_rate=1").training.learning_rate
    assert learning_rate == 1.0 and isinstance(learning_rate, float)


def test_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUET_DATA", "/data")
    monkeypatch.setenv("DUET_BUDGET", "32")
    config = changed(
        "data.domains.0.source=${DUET_DATA}/a.jsonl", "budget=${DUET_BUDGET}", "data.domains.1.source=$${X}"
    )
    assert config.data.domains[0].source == "/data/a.jsonl" and config.budget == 32
    assert config.data.domains[1].source == "${X}"
    monkeypatch.delenv("DUET_DATA")
    assert configs.loads(configs.dump(config)) == config


def test_overrides_leave_the_rest() -> None:
    config = changed("data.domains.1.max_examples=5", "training={learning_rate: 0.5}")
    assert [domain.max_examples for domain in config.data.domains] == [None, 5]
    assert config.training.learning_rate == 0.5
    assert configs.differences(changed(), config) == ["data.domains.1.max_examples", "training.learning_rate"]
    assert configs.differences(changed(), changed()) == []


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_what_the_package_brings_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUET_DATA", "/data")
    loaders = {"select": configs.load_selection, "curate": configs.load_curation, "preference": configs.load_preference}
    config = next((load for word, load in loaders.items() if word in path.name), configs.load)(path)
    assert config.name == path.stem


TEXTS = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=12)
NUMBERS = st.floats(1e-9, 1e9)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def studies(draw: st.DrawFn) -> configs.StudyConfig:
    names = draw(st.lists(TEXTS, min_size=2, max_size=4, unique=True))
    domains = tuple(
        configs.DomainConfig(
            name=name,
            source="synthetic:" + draw(TEXTS),
            max_examples=draw(st.none() | st.integers(1, 100)),
            options=draw(st.dictionaries(TEXTS, VALUES, max_size=3)),
        )
        for name in names
    )
    buckets = tuple(sorted(draw(st.sets(st.integers(2, 4096), min_size=1, max_size=4))))
    part = configs.TaskConfig(kind="exact_match", source=draw(TEXTS), max_new_tokens=draw(st.integers(1, 99)))
    weighted = configs.WeightedTask(weight=draw(NUMBERS), task=part)
    tasks = st.sampled_from(
        [
            part,
            configs.TaskConfig(kind="external"),
            configs.TaskConfig(kind="sum", tasks=(weighted, weighted)),
            configs.TaskConfig(kind="command", command=(draw(TEXTS), draw(TEXTS))),
        ]
    )
    return configs.StudyConfig(
        name="study",
        seed=draw(st.integers(0, configs.LARGEST_SEED)),
        budget=draw(st.integers(1, 10**9)),
        rounds=3,
        model=configs.ModelConfig(source=draw(TEXTS), chat=draw(st.none() | st.booleans())),
        data=configs.DataConfig(domains=domains, max_length=buckets[-1], buckets=buckets),
        training=configs.TrainingConfig(learning_rate=draw(NUMBERS)),
        task=draw(tasks),
    )


@given(studies())
def test_what_is_dumped_loads_back_equal(config: configs.StudyConfig) -> None:
    text = configs.dump(config)
    assert configs.loads(text) == config
    assert configs.dump(configs.loads(text)) == text
