"""The report: one page that loads nothing, escapes everything, and is the same for the same study."""

from __future__ import annotations

import functools
import html.parser
import math
import re
import types
from pathlib import Path

import numpy as np
import pytest

from duet_jax import config as configs
from duet_jax import recall
from duet_jax.errors import StudyError
from duet_jax.report import surrogate, write_report
from duet_jax.report.surrogate import believe
from duet_jax.search import Search
from duet_jax.study import Study

NAMES = ("plain", "</pre><script>alert(1)</script>", 'a$b$_c" onload="x', "<img src=https://example.org/x.png>")


def make_study(folder: Path, told: int, *, names: tuple[str, ...] = NAMES, waiting: int = 1) -> Study:
    """A study of `told` rounds with feedback, then one that failed, then `waiting` ones."""
    config = configs.from_dict(
        {
            "name": "small",
            "budget": 100,
            "rounds": 12,
            "model": {"scratch": {}},
            "data": {"domains": [{"name": name, "source": "a.jsonl"} for name in names]},
            "training": {"learning_rate": 0.001},
            "task": {"kind": "response_loss", "source": "https://example.org/<b>.jsonl"},
        }
    )
    study = Study.create(folder, config)
    rng = np.random.default_rng(0)
    for number in range(told + 1 + waiting):
        shares = np.full(len(names), 1 / len(names)) if number == 0 else rng.dirichlet(np.ones(len(names)))
        study.new_trial(
            mixture={name: float(share) for name, share in zip(names, shares, strict=True)},
            counts={name: int(100 * share) for name, share in zip(names, shares, strict=True)},
            proposal={"mean": 0.1, "stderr": 0.2, "acquisition": None, "origin": "ucb"} if number else None,
            seeds={},
        )
        if number < told:
            rows = [{"trial": number, "step": step, "loss": 3 / step} for step in range(1, 6)]
            study.append_metrics([*rows, {"trial": number, "step": 6, "loss": math.nan}])
            training = {
                "loss": 1.25,
                "steps": 6,
                "tokens": 98765,
                "repeats": [f"{names[-1]} is repeated"],
                "truncated": 3,
                "validation_loss": dict.fromkeys(names, 2.5),
            }
            study.update(number, stage="trained", training=training)
            study.tell(number, float(shares[0]), 0.05 if number % 2 else None)
    study.fail(told, "<script>bad()</script>")
    return study


class Stand:
    """Stands in for the search where its numbers do not matter: the mean of the two nearest observations."""

    def __init__(self, **_: object):
        pass

    def init(self) -> list[tuple[np.ndarray, float]]:
        return []

    def tell(
        self, state: list[tuple[np.ndarray, float]], mixture: np.ndarray, value: float, stderr: float | None
    ) -> list[tuple[np.ndarray, float]]:
        return [*state, (mixture, value)]

    def predict(self, state: list[tuple[np.ndarray, float]], mixtures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seen, values = np.array([m for m, _ in state]), np.array([v for _, v in state])
        distance = np.abs(mixtures[:, None] - seen).sum(-1)
        return values[distance.argmin(1)], distance.min(1) + 0.01

    def ask(self, state: object, *, key: object) -> tuple[None, types.SimpleNamespace]:
        return None, types.SimpleNamespace(noise=0.125)


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "Search", Stand)


class Elements(html.parser.HTMLParser):
    """Collects every element, attribute and text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.usefixtures("stand")
@pytest.mark.parametrize("told", [0, 1, 2, 7])
def test_a_page_loads_nothing_and_runs_nothing(tmp_path: Path, told: int) -> None:
    study = make_study(tmp_path / "study", told)
    path = write_report(study.folder)
    assert path == study.folder / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Elements(text)
    assert not {tag for tag, _ in page.elements} & {"script", "img", "link", "iframe", "object", "image"}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "style", "clip-path"):
                assert value is not None and "//" not in value, (tag, name, value)
    assert not re.search(r"url\((?!#)|@import", text)
    assert "No feedback yet." in page.text if told == 0 else "gain over uniform" in page.text
    # Whoever reads sees the names as they are.
    assert all(name in page.text for name in NAMES)
    assert "<script>bad()</script>" in page.text


@pytest.mark.usefixtures("stand")
def test_ids_occur_once_and_references_lead_somewhere(tmp_path: Path) -> None:
    text = write_report(make_study(tmp_path / "study", 5).folder).read_text(encoding="utf-8")
    elements = Elements(text).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', text)) <= set(ids)
    assert sum(tag == "svg" for tag, _ in elements) == 6


@pytest.mark.usefixtures("stand")
def test_the_same_study_gives_the_same_bytes(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", 4)
    first = write_report(study.folder).read_bytes()
    assert write_report(study.folder, tmp_path / "again.html").read_bytes() == first


@pytest.mark.usefixtures("stand")
def test_the_page_says_what_was_trained_on(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", 3)
    text = Elements(write_report(study.folder).read_text(encoding="utf-8")).text
    for words in ("3 of 12 rounds have feedback", "98,765", "is repeated", "3 examples were cut to 256 tokens"):
        assert words in text
    assert "Learned by the surrogate: 0.12." in text
    assert "Stated with the feedback (median standard error): 0.05" in text


@pytest.mark.usefixtures("stand")
def test_few_domains_and_many_domains(tmp_path: Path) -> None:
    for count in (2, 25):
        names = tuple(f"domain {i}" for i in range(count))
        study = make_study(tmp_path / f"study{count}", 2, names=names)
        text = write_report(study.folder).read_text(encoding="utf-8")
        assert all(name in text for name in names)


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", 0)
    with pytest.raises(StudyError, match="The report cannot be written to .*none"):
        write_report(study.folder, tmp_path / "none" / "report.html")
    with pytest.raises(StudyError, match="There is no study in"):
        write_report(tmp_path / "none")


# Equal searches share what they have compiled.
CACHED = functools.cache(Search)


@pytest.mark.parametrize("told", [0, 1, 2, 6])
def test_the_belief_is_that_of_the_search(tmp_path: Path, told: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "Search", CACHED)
    study = make_study(tmp_path / "study", told, names=("a", "b", "c"))
    belief = believe(study)
    if told == 0:
        assert belief is None
        return
    assert belief is not None
    search = CACHED(num_domains=3, beta=2.0, floor=0.02, initial=3)
    state = search.init()
    for mixture, value, error in zip(*study.observations(), strict=True):
        state = search.tell(state, mixture, value, error)
    mixture, mean, stderr = search.best(state)
    np.testing.assert_allclose(belief.mixtures[belief.best], mixture, rtol=1e-12)
    np.testing.assert_allclose([belief.mean[belief.best], belief.stderr[belief.best]], [mean, stderr])
    for i, line in enumerate(belief.slices):
        assert line.shares[0] == 0 and line.shares[-1] == 1 and np.all(np.diff(line.shares) > 0)
        assert line.at == belief.mixtures[belief.best, i] and np.all(np.isfinite(line.mean)) and np.all(line.stderr > 0)
    # The last point of a line is the domain alone, whatever the best mixture is.
    vertex, _ = search.predict(state, np.eye(3))
    np.testing.assert_allclose([line.mean[-1] for line in belief.slices], vertex, rtol=1e-6)


def test_lines_pass_through_the_best_mixture() -> None:
    mixture = np.array([0.5, 0.3, 0.2])
    line = surrogate._line(mixture, 0)
    np.testing.assert_allclose(line.sum(1), 1)
    np.testing.assert_allclose(line[20], mixture)
    np.testing.assert_allclose(line[0], [0, 0.6, 0.4])
    np.testing.assert_allclose(surrogate._line(np.array([1.0, 0.0, 0.0]), 0)[0], [0, 0.5, 0.5])
