"""Tasks that are not ours: functions and commands, and what they may answer."""

from __future__ import annotations

import sys

import pytest

from duet_jax.errors import ConfigError, FeedbackError
from duet_jax.feedback import Coarse, CommandTask, Feedback, PythonTask, load_function


class Exporting:
    """Stands for a deployed model: exports one file."""

    def export(self, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        return folder


def command(code: str) -> CommandTask:
    return CommandTask((sys.executable, "-c", code, "{model}"))


def test_command_gets_the_model_and_answers_on_its_last_line():
    code = (
        "import os, sys; folder = sys.argv[1]; assert folder == os.environ['DUET_MODEL'];"
        "assert os.path.exists(folder + '/config.json'); print('noise'); print(0.25)"
    )
    assert command(code)(Exporting()) == Feedback(0.25)
    assert command('print(\'{"value": 0.5, "stderr": 0.1}\')')(Exporting()) == Feedback(0.5, 0.1)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("print('good')", "its last line is 'good'"),
        ("pass", "it printed nothing"),
        ("raise SystemExit(3)", "ended with status 3"),
        ("print('NaN')", "finite number"),
        ("print('[1, 2, 3]')", "must give a number"),
    ],
)
def test_what_a_command_must_not_do(code, sentence):
    with pytest.raises(FeedbackError, match=sentence):
        command(code)(Exporting())


def test_missing_program():
    with pytest.raises(FeedbackError, match="could not be started"):
        CommandTask(("no-such-program-here",))(Exporting())


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(0.5, Feedback(0.5)), ((0.5, 0.1), Feedback(0.5, 0.1)), (Feedback(1.0, 0.2), Feedback(1.0, 0.2))],
)
def test_python_answers(answer, expected):
    assert PythonTask(lambda model: answer)(None) == expected


def test_functions_are_found_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_unseen_task.py").write_text("def score(model):\n    return 1.5\n")
    monkeypatch.chdir(tmp_path)
    assert PythonTask(load_function("my_unseen_task:score", "task.function"))(None).value == 1.5
    with pytest.raises(ConfigError, match="has no function 'other'"):
        load_function("my_unseen_task:other", "task.function")
    with pytest.raises(ConfigError, match="cannot be imported"):
        load_function("no_such_module_here:score", "task.function")


def test_stars_and_noise():
    stars = Coarse(stars=5, low=0.0, high=1.0)
    grades = [stars(Feedback(value), 0).value for value in (-3.0, 0.0, 0.12, 0.13, 0.5, 0.9, 1.0, 9.0)]
    assert grades == [1, 1, 1, 2, 3, 5, 5, 5]
    assert stars(Feedback(0.5, 0.1), 0) == Feedback(3.0, None, {"measured": 0.5})

    noisy = Coarse(noise=0.3)
    draws = [noisy(Feedback(1.0, 0.4), seed) for seed in range(400)]
    assert draws[0] == noisy(Feedback(1.0, 0.4), 0)
    values = [draw.value for draw in draws]
    mean = sum(values) / 400
    spread = (sum((v - mean) ** 2 for v in values) / 399) ** 0.5
    assert abs(mean - 1.0) < 4 * 0.3 / 20
    assert abs(spread - 0.3) < 0.045
    assert draws[0].stderr == pytest.approx(0.5)
    assert Coarse()(Feedback(1.0, 0.4), 0) == Feedback(1.0, 0.4)
