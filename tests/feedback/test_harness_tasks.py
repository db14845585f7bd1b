"""Benchmarks of the lm-evaluation-harness as tasks: their metrics with errors, groups and sums, and mistakes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from duet_jax import config as configs
from duet_jax.config import TaskConfig
from duet_jax.errors import ConfigError, DataError
from duet_jax.feedback import Deployed
from duet_jax.feedback.harness import HarnessTask, load_benchmark
from duet_jax.job import prepare
from duet_jax.models import lora as adapters
from tests.feedback.benchmarks import CONFIG, TASKS, TOKENIZER, log_probs, needs_harness, write_task


@needs_harness
def test_feedback_is_the_harness_result_with_its_error(tiny, tmp_path):
    python, legacy = random.getstate(), np.random.get_state()[1].tolist()
    config = TaskConfig(kind="harness", benchmark=write_task(tmp_path, "choose"), metric="acc_norm", batch_size=4)
    task = HarnessTask.build(load_benchmark(config), config, tiny.engine)
    found = task(tiny)
    right = []
    for row in TASKS["choose"][0]:
        context = [TOKENIZER.bos_id, *TOKENIZER.encode(row["question"])]
        scores = [
            log_probs(tiny, context, TOKENIZER.encode(" " + choice))[0] / len(choice) for choice in row["choices"]
        ]
        right.append(float(np.argmax(scores) == row["answer"]))
    assert found.value == pytest.approx(np.mean(right))
    assert found.stderr == pytest.approx(np.std(right, ddof=1) / math.sqrt(len(right)))
    assert set(found.details) == {"acc,none", "acc_norm,none"}
    assert (random.getstate(), np.random.get_state()[1].tolist()) == (python, legacy)
    assert "DISABLE_MULTIPROC" not in os.environ
    assert task(tiny) == found


@needs_harness
def test_less_is_more_where_lower_is_better(tiny, tmp_path, capfd):
    config = TaskConfig(kind="harness", benchmark=write_task(tmp_path, "cloze"), max_examples=2, batch_size=4)
    task = HarnessTask.build(load_benchmark(config), config, tiny.engine)
    found = task(tiny)
    values = []
    for row in TASKS["cloze"][0][:2]:
        ids = [[TOKENIZER.bos_id, *TOKENIZER.encode(row["text"])], TOKENIZER.encode(row["last"])]
        values.append(log_probs(tiny, *ids)[0])
    assert task.metric == "perplexity,none"
    assert found.value == pytest.approx(-math.exp(-np.mean(values)), rel=1e-4)
    assert found.stderr is not None and found.stderr > 0
    assert capfd.readouterr().out == ""


@needs_harness
def test_adapters_count(tiny, tmp_path):
    config = TaskConfig(kind="harness", benchmark=write_task(tmp_path, "cloze"), max_examples=1, batch_size=4)
    task = HarnessTask.build(load_benchmark(config), config, tiny.engine)
    rng = np.random.default_rng(2)
    factors = jax.eval_shape(lambda: adapters.init(CONFIG, adapters.LoraConfig(rank=2), key=jax.random.key(1)).factors)
    factors = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), factors)
    lora = adapters.Lora(factors, np.ones(CONFIG.num_layers, np.float32))
    with_adapters = Deployed(tiny.engine, tiny.params, lora)
    assert task(with_adapters).value != pytest.approx(task(tiny).value, rel=0.01)
    merged = Deployed(tiny.engine, jax.jit(adapters.merge)(tiny.params, lora))
    assert task(with_adapters).value == pytest.approx(task(merged).value, rel=1e-3)


@needs_harness
def test_examples_in_the_prompt_are_the_same_every_round(tiny, tmp_path):
    config = TaskConfig(kind="harness", benchmark=write_task(tmp_path, "letters"), batch_size=4)
    benchmark = load_benchmark(config)
    task = HarnessTask.build(benchmark, config, tiny.engine)
    prompts = []
    for _ in range(2):
        task(tiny)
        prompts.append([one.args for one in benchmark.loaded["tasks"]["letters"].instances])
    assert prompts[0] == prompts[1]
    assert all(context.count("Question:") == 3 for context, _ in prompts[0])


@needs_harness
def test_groups_have_the_metric_of_their_parts(tiny, tmp_path):
    parts = ["choose", "letters"]
    for name in parts:
        write_task(tmp_path, name)
    group = {"group": "both", "task": parts, "aggregate_metric_list": [{"metric": "acc", "weight_by_size": False}]}
    path = tmp_path / "both.yaml"
    path.write_text(yaml.safe_dump(group))
    config = TaskConfig(kind="harness", benchmark=str(path), batch_size=4)
    found = HarnessTask.build(load_benchmark(config), config, tiny.engine)(tiny)
    alone = []
    for name in parts:
        config = TaskConfig(kind="harness", benchmark=str(tmp_path / f"{name}.yaml"), batch_size=4)
        alone.append(HarnessTask.build(load_benchmark(config), config, tiny.engine)(tiny))
    assert found.value == pytest.approx(np.mean([one.value for one in alone]))
    assert found.stderr == pytest.approx(math.hypot(*(one.stderr for one in alone)) / 2)
    path.write_text(yaml.safe_dump({"group": "both", "task": parts}))
    config = TaskConfig(kind="harness", benchmark=str(path))
    with pytest.raises(ConfigError, match="is a group without a metric of its own; use one of choose, letters"):
        HarnessTask.build(load_benchmark(config), config, tiny.engine)


@needs_harness
def test_a_study_sums_benchmarks(tmp_path):
    walk = {"source": "synthetic:walk", "options": {"letters": 6, "length": 8, "examples": 40}}
    parts = [
        {"weight": w, "task": {"kind": "harness", "benchmark": write_task(tmp_path, name), "batch_size": 4}}
        for w, name in ((2.0, "choose"), (0.5, "letters"))
    ]
    job = prepare(
        configs.from_dict(
            {
                "name": "summed",
                "budget": 16,
                "rounds": 1,
                "model": {"scratch": {"hidden_size": 16, "intermediate_size": 16, "num_layers": 1}},
                "data": {"max_length": 96, "domains": [{"name": name, **walk} for name in "ab"]},
                "training": {"learning_rate": 0.01, "batch_size": 4},
                "task": {"kind": "sum", "tasks": parts},
            }
        ),
        tmp_path / "study",
        lambda line: None,
    )
    found = job.task(Deployed(job.engine, job.model.params))
    alone = [part(Deployed(job.engine, job.model.params)) for _, part in job.task.parts]
    assert found.value == pytest.approx(2.0 * alone[0].value + 0.5 * alone[1].value)
    assert found.stderr == pytest.approx(math.hypot(2.0 * alone[0].stderr, 0.5 * alone[1].stderr))


@needs_harness
@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({}, {"metric": "f1"}, ConfigError, "metric is 'f1'; the benchmark choose has acc,none, acc_norm,none"),
        ({"num_fewshot": 0}, {"num_fewshot": 3}, ConfigError, "num_fewshot is 3, but .* made for 0"),
        ({"unsafe_code": True}, {}, ConfigError, "runs code that the model writes"),
        ({"doc_to_image": "x"}, {}, ConfigError, "must be text alone"),
        ({"doc_to_choice": "{{nothing.at.all}}"}, {}, DataError, "choose.yaml cannot be loaded: .*nothing"),
        ({"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}, {}, DataError, "cannot be loaded: .*gone.jsonl"),
        ({}, {"max_length": 97}, ConfigError, "max_length is 97, but the model tiny takes at most 96"),
        ({"metric_list": [{"metric": "acc", "higher_is_better": None}]}, {}, ConfigError, "does not say whether"),
        (
            {"output_type": "generate_until", "doc_to_choice": None, "metric_list": [{"metric": "exact_match"}]},
            {},
            ConfigError,
            "set max_gen_toks below that",
        ),
        (
            {"doc_to_choice": ["a" * 200, "b"], "doc_to_target": 0},
            {},
            DataError,
            "has 201 tokens; it must have 1 to 96",
        ),
    ],
)
def test_mistakes_are_told_before_training(tiny, tmp_path, changes, options, error, message):
    config = TaskConfig(kind="harness", benchmark=write_task(tmp_path, "choose", **changes), **options)
    with pytest.raises(error, match=message):
        HarnessTask.build(load_benchmark(config), config, tiny.engine)


def test_the_harness_is_asked_for_by_name(monkeypatch):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    config = TaskConfig(kind="harness", benchmark="arc_easy")
    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ConfigError, match=r"needs lm_eval; install it with: pip install 'duet_jax\[eval\]'"):
        load_benchmark(config)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.4.9.2")
    with pytest.raises(ConfigError, match="lm_eval is 0.4.9.2; it must be at least 0.4.12"):
        load_benchmark(config)


def test_fields_of_the_configuration_are_checked():
    with pytest.raises(ConfigError, match="benchmark is missing"):
        TaskConfig(kind="harness")
    with pytest.raises(ConfigError, match="num_fewshot is -1"):
        TaskConfig(kind="harness", benchmark="x", num_fewshot=-1)
    with pytest.raises(ConfigError, match="benchmark has no meaning for a task of kind 'perplexity'"):
        TaskConfig(kind="perplexity", source="x", benchmark="x")


@needs_harness
@pytest.mark.slow
def test_an_unknown_benchmark_is_told_with_the_nearest_one():
    with pytest.raises(ConfigError, match="'arc_eesy', which is no file and none of the .* did you mean 'arc_easy'"):
        load_benchmark(TaskConfig(kind="harness", benchmark="arc_eesy"))
