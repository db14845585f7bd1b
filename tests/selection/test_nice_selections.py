"""NICE from configurations: what they must say, and selections and studies that choose by rewards of prompts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from duet_jax import cli, duet
from duet_jax import config as configs
from duet_jax._decode import decode
from duet_jax.config import SelectorConfig
from duet_jax.data import load_examples
from duet_jax.data.texts import Texts
from duet_jax.errors import ConfigError
from duet_jax.loading import load, load_goal
from duet_jax.reading import load_all
from tests.small import SCRATCH, write_rows

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"kind": "less"}, "policy has no meaning for a selector of kind 'less'; leave it out."),
        (
            {"policy": {"compat": True, "top_k": 7}},
            "policy.top_k is 7, but is set by compat; leave out top_k or",
        ),
        (
            {"policy": {"external": "x", "guidance": True}},
            "policy.guidance is True, but has no meaning for replies from a file; leave out guidance or external.",
        ),
        ({"policy": {"samples": 1}}, "policy.samples is 1; it must be at least 2 for the advantage 'leave_one_out'"),
        ({"policy": {"top": 3}}, "policy.top is of the variants of rejection; leave it out, or choose one of them."),
        (
            {"policy": {"variant": "rejection", "worst_case_protection": True, "advantage": "gold"}},
            "policy.advantage is 'gold', by which a label that counts as a reply counts 0; choose another",
        ),
        ({"policy": {"temperature": 0}}, "policy.temperature is 0.0; it must be greater than 0."),
        ({"policy": {"top_p": 0}}, "policy.top_p is 0.0; it must be in (0, 1]."),
        ({"policy": {"stop": [""]}}, "policy.stop is ['']; it must be a list of texts that are not empty."),
        ({"policy": {"sample": 3}}, "policy.sample is not a field; did you mean policy.samples?"),
        (
            {"policy": {"guidance": True}, "targets": [{"name": "t", "source": "x", "response": None}]},
            "targets.0.response is null, but policy.guidance needs labels; name the column.",
        ),
    ],
)
def test_mistakes_are_told_in_one_sentence(fields: dict[str, Any], sentence: str) -> None:
    tree = {"kind": "nice", "policy": {"samples": 4}, "reward": {"kind": "exact_match"}} | fields
    with pytest.raises(ConfigError) as caught:
        decode(SelectorConfig, tree)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


WALK = {"letters": 5, "length": 6, "examples": 24}
CONFIG: dict[str, Any] = {
    "name": "walks",
    "model": {"scratch": SCRATCH},
    "training": {"learning_rate": 0.01, "batch_size": 8, "lora": {"rank": 2}},
    "data": {
        "max_length": 12,
        "buckets": [12],
        "validation_fraction": 0.2,
        "domains": [{"name": tag, "source": "synthetic:walk", "options": {**WALK, "tags": tag}} for tag in ("A", "B")],
    },
}
ASKING = {
    "kind": "nice",
    "rule": "top_k",
    "warmup_epochs": 1,
    "k": 512,
    "policy": {"samples": 6, "max_new_tokens": 4},
    "reward": {"kind": "regex", "pattern": "a", "where": "anywhere"},
}


@pytest.mark.slow
def test_a_selection_for_prompts_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_rows(tmp_path / "t.jsonl", [{"id": i, "prompt": f"A {i}"} for i in "abcde"])
    target = {"name": "asked", "source": source, "response": None}
    tree = CONFIG | {"count": 10, "selector": ASKING | {"targets": [target]}}
    (tmp_path / "nice.yaml").write_text(yaml.safe_dump(tree))
    words = ["select", str(tmp_path / "nice.yaml"), "--output", str(tmp_path / "out"), "--quiet"]
    assert cli.main([*words[:2], "selector.reward={kind: exact_match}", *words[2:]]) == 2
    assert "compares replies with the right answer, but example a has neither" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("trajectory-*")), "told before anything was trained"
    assert cli.main(words) == 0
    about = json.loads((tmp_path / "out" / "selection.json").read_text())
    assert "epoch-1: mean reward" in " ".join(about["log"]) and "sketch error of a cosine" in " ".join(about["log"])
    assert len((tmp_path / "out" / "selected.jsonl").read_text().splitlines()) == 10
    assert (
        cli.main([*words[:2], "selector={kind: less, targets: [{name: t, source: x, response: null}]}", *words[2:]])
        == 2
    )
    assert "selector.targets.0.response is null, but a selector of kind 'less' needs labels" in capsys.readouterr().err


@pytest.mark.slow
def test_replies_from_a_file_that_are_cut_are_told(tmp_path: Path) -> None:
    rows = [
        {"id": name, "prompt": "A", "replies": ["bcb", text]} for name, text in zip("ab", ("a", "abcd"), strict=True)
    ]
    source = write_rows(tmp_path / "t.jsonl", rows)
    target = {"name": "asked", "source": source, "response": None}
    policy = {"external": source, "max_new_tokens": 4}
    tree = CONFIG | {"name": "cut", "count": 10, "selector": ASKING | {"targets": [target], "policy": policy}}
    config = decode(configs.SelectConfig, tree)
    assert config.model is not None and config.training is not None
    domains = load_all(config.data, 0)
    goal = load_goal(config.selector, config.data.domains, domains, 0, tmp_path)
    others = [example for _, examples in goal.targets for example in examples]
    loaded = load(config.model, config.data, config.training, domains, others, 0, lambda _: None)
    said: list[str] = []
    loaded.utilities(config.selector, goal, tmp_path, 0, said.append, lambda *_: None)
    # With the end of text after it, "abcd" has five tokens.
    assert said[0].endswith(
        "t.jsonl: 1 of 4 replies are cut at 4 tokens, for the reward too; raise "
        "selector.policy.max_new_tokens to have them whole"
    )


def test_every_set_of_prompts_needs_one_reward() -> None:
    task = {"kind": "response_loss", "source": "synthetic:walk", "options": {**WALK, "tags": "A"}}
    asking = ASKING | {"reward": None}
    target = {"name": "t", "source": "t.jsonl"}

    def domains(selector: dict[str, Any], *rewards: dict[str, Any] | None) -> dict[str, Any]:
        own = [one | {"reward": reward} for one, reward in zip(CONFIG["data"]["domains"], rewards, strict=True)]
        data = CONFIG["data"] | {"domains": own}
        return CONFIG | {"budget": 12, "rounds": 1, "task": task, "data": data, "selector": selector}

    exact = {"kind": "exact_match"}
    configs.from_dict(domains(asking, exact, exact))
    for tree, sentence in (
        (domains(asking, exact, None), "selector.reward is missing, and so is data.domains.1.reward; a selector of"),
        (domains(asking | {"targets": [target]}, None, None), "is missing, and so is targets.0.reward"),
        (domains({}, exact, None), "kind is 'random', which does not read the reward of the domain 'A'"),
        (domains(ASKING | {"targets": [target]}, exact, None), "does not read the reward of the domain 'A'"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            configs.from_dict(tree)


def test_rewards_know_prompts_that_lie_in_files(tmp_path: Path) -> None:
    """Each set its own reward, though ids and examples are equal and are read anew whenever they are asked for."""
    source = write_rows(tmp_path / "d.jsonl", [{"id": i, "prompt": "A", "response": i} for i in "abcdefghij"])
    rewards = {"A": {"kind": "exact_match"}, "B": {"kind": "regex", "pattern": "z", "where": "anywhere"}}
    domains = [{"name": name, "source": source, "reward": reward} for name, reward in rewards.items()]
    data = CONFIG["data"] | {"domains": domains}
    tree = CONFIG | {"name": "files", "count": 10, "data": data, "selector": ASKING | {"reward": None}}
    config = decode(configs.SelectConfig, tree)
    read = load_all(config.data, 0, tmp_path / "data")
    assert isinstance(read[0].validation, Texts)
    goal = load_goal(config.selector, config.data.domains, read, 0, tmp_path)
    assert goal.reward is not None and len(goal.asked) == sum(len(domain.validation) for domain in read) > 2
    replies = [example.response for example in goal.asked]
    assert goal.reward(replies, goal.asked).tolist() == [1.0] * len(read[0].validation) + [0.0] * len(
        read[1].validation
    )


@pytest.mark.slow
def test_a_study_chooses_by_its_own_prompts(tmp_path: Path) -> None:
    task = {"kind": "response_loss", "source": "synthetic:walk", "options": {**WALK, "tags": "A"}, "batch_size": 8}
    data = copy.deepcopy(CONFIG["data"])
    walks = load_examples(decode(configs.DomainConfig, data["domains"][1]))
    rows = [{"id": one.id, "prompt": one.prompt, "response": one.response} for one in walks]
    reward = {"kind": "regex", "pattern": "b", "where": "anywhere"}
    data["domains"][1] = {"name": "B", "source": write_rows(tmp_path / "b.jsonl", rows), "reward": reward}
    config = configs.from_dict(CONFIG | {"budget": 12, "rounds": 1, "task": task, "data": data, "selector": ASKING})
    assert duet.run(config, tmp_path / "study", quiet=True).trial is not None
    job = duet.jobs.prepare(config, tmp_path / "study", lambda line: None)
    assert all(np.ptp(values) > 0 for values in job.utilities)
    rows, _ = job.sample(np.array([6, 6]), 0)
    for domain, values in enumerate(job.utilities):
        inside = rows[(rows >= job.starts[domain]) & (rows < job.starts[domain + 1])] - job.starts[domain]
        np.testing.assert_allclose(np.sort(values[inside]), np.sort(values)[-6:])


def test_the_recipe_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUET_DATA", "data")
    config = configs.load_selection(ROOT / "configs" / "nice_select.yaml")
    assert config.selector.kind == "nice" and config.selector.reward is not None and config.selector.targets
