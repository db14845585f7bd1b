"""`duet prefer`: pairs in, a model out, resumable at every stage, every mistake told before anything is computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np
import pytest
import yaml

from duet_jax import cli, models, prefer
from duet_jax import config as configs
from duet_jax.config import PairsConfig
from duet_jax.data import Encoded
from duet_jax.data.preferences import Pairs, differing, load_pairs, pair
from duet_jax.training.preference_trainer import PairReport, PreferenceTrainer
from duet_jax.training.sft import Trainer
from tests.small import SCRATCH, write_rows

MODEL = {"scratch": SCRATCH}
TRAINING = {"learning_rate": 0.03, "batch_size": 8, "epochs": 2, "checkpoint_every": 2, "lora": {"rank": 4}}


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """40 pairs: the chosen response repeats its first letter, a to c, and the rejected one another, d to f."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(40):
        one, other = rng.choice(list("abc")), rng.choice(list("def"))
        rows.append({"id": f"r{number}", "prompt": f"{one}{other}", "chosen": one * 4, "rejected": other * 3})
    source = write_rows(tmp_path / "pairs.jsonl", rows)
    data = {"source": source, "max_length": 12, "buckets": [12], "validation_fraction": 0.2}
    return {"name": "prefer", "model": MODEL, "data": data, "training": TRAINING, "loss": {"beta": 0.5}}


def run(tmp_path: Path, tree: dict[str, Any], *words: str, output: str = "out") -> int:
    path = tmp_path / "prefer.yaml"
    path.write_text(yaml.safe_dump(tree))
    return cli.main(["prefer", str(path), *words, "--output", str(tmp_path / output), "--quiet"])


def results(tmp_path: Path, output: str = "out") -> dict[str, Any]:
    return json.loads((tmp_path / output / "results.json").read_text())


def noted(tmp_path: Path, output: str = "out") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / output / "metrics.jsonl").read_text().splitlines()]


def weights(tmp_path: Path, output: str) -> bytes:
    return (tmp_path / output / "model" / "model.safetensors").read_bytes()


class Killed(Exception):
    pass


def killed_at(monkeypatch: pytest.MonkeyPatch, step: int, fits: int = 1) -> None:
    """Lets training number `fits` of the process end at a step, as if it were killed."""
    fit, count = PreferenceTrainer.fit, iter(range(1, 99))

    def stop(self: PreferenceTrainer, *args: Any, on_step: Any, **more: Any) -> Any:
        this = next(count) == fits

        def killing(report: PairReport) -> None:
            on_step(report)
            if this and report.step == step:
                raise Killed

        return fit(self, *args, on_step=killing, **more)

    monkeypatch.setattr(PreferenceTrainer, "fit", stop)


def test_a_training_and_one_that_was_killed(
    tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path, given) == 0
    (found,) = results(tmp_path)["iterations"]
    assert (found["pairs"], found["held_out"], found["steps"], found["beta_eff"]) == (32, 8, 8, 0.5)
    assert found["validation"]["accuracy"] > 0.8 and found["validation"]["loss"] < 0.6
    rows = noted(tmp_path)
    steps = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-3) and steps[0]["margin"] == pytest.approx(0, abs=1e-3)
    assert [row["step"] for row in rows if row["split"] == "validation"] == [4, 8]
    model = models.load(tmp_path / "out" / "model")
    assert model.config.num_layers == 1
    # Another run measures again what was found, and notes nothing twice.
    assert run(tmp_path, given) == 0
    assert noted(tmp_path) == rows and results(tmp_path)["iterations"][0]["validation"] == found["validation"]

    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 5)
        run(tmp_path, given, output="killed")
    with monkeypatch.context() as patch:
        # The reference is there already.
        patch.setattr("duet_jax.selection.losses.response_log_probs", None)
        assert run(tmp_path, given, output="killed") == 0
    assert weights(tmp_path, "killed") == weights(tmp_path, "out")
    assert results(tmp_path, "killed")["iterations"][0]["validation"] == found["validation"]


def test_davir_dpo_of_all_parameters_says_what_its_beta_is(tmp_path: Path, given: dict[str, Any]) -> None:
    assert run(tmp_path, given, "loss={kind: davir_dpo, beta: 5}", "training.method=full", "training.epochs=1") == 0
    about = results(tmp_path)
    (found,) = about["iterations"]
    assert found["beta_eff"] == pytest.approx(5 / found["mean_reference"])
    assert any("davir_dpo with beta 5, which is" in line for line in about["log"])


def test_self_play_goes_on_where_it_was_killed_and_takes_more_iterations(
    tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given["data"]["rejected"] = None
    given |= {"spin": {"iterations": 2, "max_new_tokens": 5, "batch_size": 4}}
    assert run(tmp_path, given) == 0
    first, second = results(tmp_path)["iterations"]
    # From the second iteration on, the replies of the one before are trained on, too.
    assert (first["pairs"], second["pairs"], second["held_out"]) == (32, 64, 8)
    assert first["validation"]["margin"] > 0

    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 3, fits=2)
        run(tmp_path, given, output="killed")
    with monkeypatch.context() as patch:
        patch.setattr("duet_jax.feedback.deployed.generate", None)
        assert run(tmp_path, given, output="killed") == 0
    assert weights(tmp_path, "killed") == weights(tmp_path, "out")
    assert results(tmp_path, "killed")["iterations"][1]["validation"] == second["validation"]
    # Another number of iterations is no other training: what is done stays.
    with monkeypatch.context() as patch:
        patch.setattr("duet_jax.feedback.deployed.generate", None)
        assert run(tmp_path, given, "spin.iterations=1") == 0
    assert results(tmp_path)["iterations"] == [first | {"seconds": results(tmp_path)["iterations"][0]["seconds"]}]


def test_each_iteration_of_self_play_begins_where_the_one_before_ended(
    tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    writers: list[list[np.ndarray]] = []
    references: list[list[np.ndarray]] = []
    compiled: list[int] = [0]
    done: list[int] = []

    def factors(lora: Any) -> list[np.ndarray]:
        return [np.asarray(x) for x in jax.tree.leaves(lora.factors)]

    def replies(model: Any, *more: Any, **named: Any) -> Any:
        writers.append(factors(model.lora))
        return written(model, *more, **named)

    def losses(pool: Any, data: Any, params: Any, lora: Any, *more: Any) -> Any:
        references.append(factors(lora))
        return scored(pool, data, params, lora, *more)

    def iteration(*arguments: Any) -> Any:
        found = iterate(*arguments)
        done.append(compiled[0])
        return found

    def listen(event: str, *_: Any, **__: Any) -> None:
        compiled[0] += event == "/jax/core/compile/backend_compile_duration"

    written, scored, iterate = prefer.replies, prefer.losses, prefer._Job._iteration
    monkeypatch.setattr(prefer, "replies", replies)
    monkeypatch.setattr(prefer, "losses", losses)
    monkeypatch.setattr(prefer._Job, "_iteration", iteration)
    given["data"]["rejected"] = None
    given |= {"spin": {"iterations": 2, "max_new_tokens": 5, "batch_size": 4}}
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert run(tmp_path, given) == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    # The second iteration finds all its programs compiled.
    assert done[0] > 0 and done[1] == done[0]
    # Training and held-out prompts are replied to; of the second iteration, the first one's pairs come by again.
    assert (len(writers), len(references)) == (4, 4 + 6)
    for one, (own, others) in enumerate(((writers[:2], references[:4]), (writers[2:], references[4:]))):
        for found in (*own, *others):
            assert all(np.array_equal(x, y) for x, y in zip(found, writers[2 * one], strict=True))
    assert not all(np.array_equal(x, y) for x, y in zip(writers[0], writers[2], strict=True))
    for number in range(2):
        first = next(row for row in noted(tmp_path) if (row["iteration"], row["split"]) == (number, "train"))
        assert first["loss"] == pytest.approx(np.log(2), abs=1e-3) and first["margin"] == pytest.approx(0, abs=1e-3)


def test_a_restored_state_takes_the_place_of_the_first_one(
    tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["training.method=full", "training.epochs=1"]
    assert run(tmp_path, given, *words) == 0
    started: list[Any] = []
    start = Trainer.start

    def starting(self: Trainer, key: jax.Array) -> Any:
        started.append(start(self, key))
        return started[-1]

    monkeypatch.setattr(Trainer, "start", starting)
    assert run(tmp_path, given, *words) == 0
    assert len(started) == 1 and all(x.is_deleted() for x in jax.tree.leaves(started))


def test_pairs_that_are_the_same_when_they_are_cut_are_left_out(tmp_path: Path, given: dict[str, Any]) -> None:
    rows = [json.loads(line) for line in Path(given["data"]["source"]).read_text().splitlines()]
    for number in range(3):
        rows[number] |= {"chosen": "a" * 20, "rejected": "a" * 30}
    given["data"] |= {"source": write_rows(tmp_path / "same.jsonl", rows), "validation_fraction": 0}
    assert run(tmp_path, given, "training.epochs=1") == 0
    about = results(tmp_path)
    assert (about["iterations"][0]["pairs"], about["iterations"][0]["validation"]) == (37, None)
    assert "3 pairs are left out, whose two responses are the same within max_length 12" in about["log"]
    rows[5]["chosen"] = "b" * 20
    write_rows(tmp_path / "same.jsonl", rows)
    assert run(tmp_path, given, "training.epochs=1", output="cut") == 0
    assert any("1 of 74 responses are cut at 12 tokens" in line for line in results(tmp_path, "cut")["log"])
    write_rows(tmp_path / "same.jsonl", rows[:3])
    assert run(tmp_path, given, output="none") == 2


def test_pairs_of_whole_conversations(tmp_path: Path) -> None:
    def turns(reply: str, asked: str = "u") -> list[dict[str, str]]:
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]

    rows = [{"id": f"c{i}", "chosen": turns("yes"), "rejected": turns("no")} for i in range(4)]
    config = PairsConfig(source=write_rows(tmp_path / "c.jsonl", rows), prompt=None, validation_fraction=0.25)
    chosen, rejected = load_pairs(config, 0)
    assert (len(chosen.train), len(chosen.validation)) == (3, 1)
    assert [e.id for e in chosen.train] == [e.id for e in rejected.train]
    assert {(e.response, f.response) for e, f in zip(chosen.train, rejected.train, strict=True)} == {("yes", "no")}
    assert chosen.train[0].prompt == ({"role": "user", "content": "u"},)


def test_held_out_pairs_of_another_file(tmp_path: Path) -> None:
    def file(name: str, count: int) -> str:
        rows = [{"id": f"{name}{i}", "prompt": "p", "chosen": "yes", "rejected": "no"} for i in range(count)]
        return write_rows(tmp_path / f"{name}.jsonl", rows)

    sources = {"source": file("a", 9), "validation": file("b", 20)}
    drawn = []
    for seed in (0, 1):
        chosen, rejected = load_pairs(PairsConfig(**sources, max_examples=4, validation_examples=5), seed)
        assert len(chosen.train) == 4 and all(example.id.startswith("a") for example in chosen.train)
        drawn.append([example.id for example in rejected.validation])
        assert drawn[-1] == [example.id for example in chosen.validation] and len(drawn[-1]) == 5
    # A random sample, and another one for another seed.
    assert drawn[0] != drawn[1] and [f"b{i}" for i in range(5)] not in drawn
    assert not load_pairs(PairsConfig(**sources, validation_examples=0), 0)[0].validation


@pytest.mark.parametrize(("most", "held_out"), [(256, 10), (4, 4), (0, 0)])
def test_what_is_not_held_out_is_trained_on(tmp_path: Path, most: int, held_out: int) -> None:
    rows = [{"id": str(i), "prompt": "p", "chosen": "yes", "rejected": "no"} for i in range(20)]
    source = write_rows(tmp_path / "p.jsonl", rows)
    config = PairsConfig(source=source, validation_fraction=0.5, validation_examples=most)
    chosen, rejected = load_pairs(config, 0)
    assert (len(chosen.train), len(chosen.validation)) == (20 - held_out, held_out)
    assert [e.id for e in chosen.validation] == [e.id for e in rejected.validation]


def test_a_split_for_what_is_trained_on_and_one_for_what_is_held_out(tmp_path: Path) -> None:
    for split in ("train", "test", "dev"):
        rows = [{"id": f"{split}{i}", "prompt": "p", "chosen": "yes", "rejected": "no"} for i in range(2)]
        write_rows(tmp_path / f"{split}.jsonl", rows)
    for more, held_out in (({}, "test"), ({"validation_split": "dev"}, "dev")):
        chosen, _ = load_pairs(PairsConfig(source=str(tmp_path), validation=str(tmp_path), **more), 0)
        assert [e.id for e in chosen.train] == ["train0", "train1"]
        assert [e.id for e in chosen.validation] == [f"{held_out}0", f"{held_out}1"]


def test_pairs_of_different_responses() -> None:
    def side(*words: str) -> Encoded:
        tokens = tuple(np.array([*map(ord, word)], np.int32) for word in words)
        return Encoded(tokens, np.ones(len(words), np.int32), tuple("abcd"), (False,) * len(words))

    found = differing(Pairs(side("xy", "xyz", "xy", "xyz"), side("xy", "xy", "xz", "xyz")))
    assert found.chosen.ids == found.rejected.ids == ("b", "c")


def test_pairs_keep_what_both_responses_have() -> None:
    def side(ids: str) -> Encoded:
        tokens = tuple(np.full(3, ord(name), np.int32) for name in ids)
        return Encoded(tokens, np.ones(len(ids), np.int32), tuple(ids), (False,) * len(ids))

    found = pair(side("abcd"), side("dbx"))
    assert found.chosen.ids == found.rejected.ids == ("b", "d")
    assert [int(tokens[0]) for tokens in found.rejected.tokens] == [ord("b"), ord("d")]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["data.rejected=null"], "data.rejected is null; name the column, or give spin for the model's own replies."),
        (["spin={}"], "data.rejected is a column, but self-play samples the rejected responses; set it to null"),
        (["data.rejected=worse"], "has no column 'worse' (mapped as the response); its columns are chosen, id"),
        (["data.validation_split=dev"], "data.validation_split has no meaning without validation; leave it out"),
        (["data.buckets=[8]"], "data.buckets is [8]; it must be a list that ends with max_length (12)."),
        (["data.max_examples=0"], "data.max_examples is 0; it must be at least 1."),
        (["data.rejected=chosen"], "data.rejected is 'chosen'; it must be another column than chosen."),
        (["loss.beta=0"], "loss.beta is 0.0; it must be greater than 0."),
        (["loss.eps=1"], "loss.eps has no meaning for the loss 'dpo'; leave it out."),
        (["training.online={candidates: 16}"], "training.online is of the rounds of a study; leave it out"),
        (["data.rejected=null", "spin={max_new_tokens: 11}"], "spin: a prompt of"),
        (["data.prompt=null"], "has malformed messages"),
    ],
)
def test_mistakes_are_told_in_one_sentence(
    tmp_path: Path, given: dict[str, Any], capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert run(tmp_path, given, *words) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_one_configuration_and_one_process_a_folder(
    tmp_path: Path, given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    with filelock.FileLock(tmp_path / "out" / ".lock"):
        assert run(tmp_path, given) == 2
    assert "Another process trains on preferences in" in capsys.readouterr().err
    # A mistake in the data leaves the folder to the configuration without it.
    assert run(tmp_path, given, "data.source=nowhere.jsonl") == 2
    assert not (tmp_path / "out" / "config.yaml").exists()
    (tmp_path / "out" / "config.yaml").write_text(configs.dump(configs.load_preference(tmp_path / "prefer.yaml")))
    capsys.readouterr()
    assert run(tmp_path, given, "loss.beta=0.2", "data.max_length=20", "data.buckets=[20]") == 2
    differing = "data.max_length, data.buckets.0, loss.beta"
    assert f"another configuration; these fields differ: {differing}" in capsys.readouterr().err


def test_conversations_that_part_before_the_reply_are_refused(tmp_path: Path, given: dict[str, Any], capsys) -> None:
    turns = [[{"role": "user", "content": asked}, {"role": "assistant", "content": "x"}] for asked in "ab"]
    source = write_rows(tmp_path / "c.jsonl", [{"id": "c0", "chosen": turns[0], "rejected": turns[1]}])
    assert run(tmp_path, given, f"data.source={source}", "data.prompt=null") == 2
    assert "of 'c0' differ before their last reply; both must answer the same prompt" in capsys.readouterr().err
