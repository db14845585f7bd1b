"""The report: one page that loads nothing, escapes everything, and is the same for the same study."""

from __future__ import annotations

import functools
import html.parser
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from duet_jax import config as configs
from duet_jax import recall
from duet_jax.errors import StudyError
from duet_jax.report import figures, surrogate, write_report
from duet_jax.report.surrogate import believe
from duet_jax.search import Choice, Constraints, Number, Scores, Search, Subset
from duet_jax.search.diagnostics import Effects, LeftOut, Report, diagnose
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
    gaps = {2: 1e-6, 3: 0.0, 4: 1e-9}
    for number in range(told + 1 + waiting):
        shares = np.full(len(names), 1 / len(names)) if number == 0 else rng.dirichlet(np.ones(len(names)))
        study.new_trial(
            mixture={name: float(share) for name, share in zip(names, shares, strict=True)},
            counts={name: int(100 * share) for name, share in zip(names, shares, strict=True)},
            proposal={"mean": 0.1, "stderr": 0.2, "acquisition": None, "gap": gaps.get(number), "origin": "ucb"}
            if number
            else None,
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

    feedback = Scores()

    def __init__(self, **_: object):
        pass

    def init(self) -> list[tuple[np.ndarray, float]]:
        return []

    def tell(
        self,
        state: list[tuple[np.ndarray, float]],
        mixture: np.ndarray,
        value: float,
        stderr: float | None,
        **_: object,
    ) -> list[tuple[np.ndarray, float]]:
        return [*state, (mixture, value)]

    def predict(
        self, state: list[tuple[np.ndarray, float]], mixtures: np.ndarray, _: object
    ) -> tuple[np.ndarray, np.ndarray]:
        seen, values = np.array([m for m, _ in state]), np.array([v for _, v in state])
        distance = np.abs(mixtures[:, None] - seen).sum(-1)
        return values[distance.argmin(1)], distance.min(1) + 0.01


def stand_diagnose(_: object, state: list[tuple[np.ndarray, float]]) -> Report:
    """Stands in for the diagnosis: importances 0.5, 0.6 ... 0.9 in turn, and predictions that are off by 1, 2 ..."""
    size, values = len(state[0][0]), np.array([value for _, value in state])
    grid = np.tile(np.linspace(0, 1, 5), (size, 1))
    effects = Effects(grid, grid, 0.1 + 0 * grid, 0.5 + np.arange(size) % 5 / 10)
    error = np.arange(len(values)) + 1.0
    left_out = LeftOut(values, values - error, error, 0 * error + 1, np.array([0.0, 1.0, 1.0]), 0 * error - 1.25)
    return Report(
        np.ones(size), np.full(size, 1 / size), effects, left_out, noise=0.125, amplitude=0.75, shortfall=None
    )


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "Search", Stand)
    monkeypatch.setattr(surrogate, "diagnose", stand_diagnose)


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
    assert sum(tag == "svg" for tag, _ in elements) == 10


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
    assert "Learned by the surrogate: 0.12, where mixtures differ by about 0.75" in text
    assert "Stated with the feedback (median standard error): 0.05" in text


def drawing(page: str, title: str) -> str:
    """The text of one drawing, "" if the page has none of that title."""
    found = re.search(rf'<svg [^>]*aria-label="{re.escape(title)}">.*?</svg>', page, re.DOTALL)
    return found[0] if found else ""


@pytest.mark.usefixtures("stand")
def test_the_page_says_which_domains_matter_and_whether_to_believe_it(tmp_path: Path) -> None:
    page = write_report(make_study(tmp_path / "study", 6).folder).read_text(encoding="utf-8")
    shown = Elements(drawing(page, "importance of each domain")).text
    for words in (*("50 %", "60 %", "70 %", "80 %"), "25 %", "<img src=https"):
        assert words in shown, words
    assert drawing(page, "average predicted feedback by share of each domain").count("<path") > 8
    assert drawing(page, "each feedback predicted from all others")
    text = " ".join(Elements(page).text.split())
    assert "Feedback of 6 rounds, each predicted from all others: 0 within the 50 % interval (3.0 expected);" in text
    assert "6 within the 95 % interval (5.7 expected). The mean log density is -1.25 nats." in text


@pytest.mark.usefixtures("stand")
def test_gaps_are_drawn_where_proposals_have_them(tmp_path: Path) -> None:
    title = "Frank-Wolfe gap of each proposal"
    with_gaps = make_study(tmp_path / "with", 4)
    assert [figures.gap_of(trial) for trial in with_gaps.trials()] == [None, None, 1e-6, 0.0, 1e-9, None]
    drawn = drawing(write_report(with_gaps.folder).read_text(encoding="utf-8"), title)
    assert drawn.count("<use ") >= 3 and "1e\N{MINUS SIGN}12" in drawn
    without = make_study(tmp_path / "without", 1, waiting=0)
    page = write_report(without.folder).read_text(encoding="utf-8")
    assert not drawing(page, title) and "Certificate" not in page
    # One feedback alone is predicted from nothing.
    assert "Whether to believe it" not in page and drawing(page, "importance of each domain")


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
    search = CACHED(num_domains=3, beta=2.0, initial=3, constraints=Constraints(floor=0.02))
    state = search.init()
    for mixture, value, error in zip(*study.observations(), strict=True):
        state = search.tell(state, mixture, value, error)
    mixture, mean, stderr, _ = search.best(state)
    np.testing.assert_allclose(belief.mixtures[belief.best], mixture, rtol=1e-12)
    np.testing.assert_allclose([belief.mean[belief.best], belief.stderr[belief.best]], [mean, stderr])
    for i, line in enumerate(belief.slices):
        assert line.shares[0] == 0 and line.shares[-1] == 1 and np.all(np.diff(line.shares) > 0)
        assert line.at == belief.mixtures[belief.best, i] and np.all(np.isfinite(line.mean)) and np.all(line.stderr > 0)
    for one, two in zip(jax.tree.leaves(belief.report), jax.tree.leaves(diagnose(search, state)), strict=True):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_allclose(belief.report.left_out.values, belief.values, rtol=1e-9, atol=1e-12)
    # The last point of a line is the domain alone, whatever the best mixture is.
    vertex, _ = search.predict(state, np.eye(3))
    np.testing.assert_allclose([line.mean[-1] for line in belief.slices], vertex, rtol=1e-6)
    np.testing.assert_allclose(belief.report.effects.mean[:, -1], vertex, rtol=1e-6)


def test_settings_are_compared_one_at_a_time() -> None:
    rank, rate = (
        Number("training.lora.rank", 2, 4, integer=True),
        Number("training.learning_rate", 1e-4, 1e-2, log=True),
    )
    assert surrogate._others(rank, 3) == [2, 3, 4]
    rates = surrogate._others(rate, 1e-3)
    assert len(rates) == surrogate.POINTS and rates[20] == pytest.approx(1e-3) and rates == sorted(rates)
    assert surrogate._others(Choice("training.schedule", ("linear", "cosine")), "cosine") == ["linear", "cosine"]
    targets = Subset("training.lora.targets", ("q", "k", "v"), least=2)
    assert surrogate._others(targets, ("q", "v")) == [("q", "v"), ("q", "k", "v")]
    line = surrogate._along(targets, [("q", "v"), ("q", "k", "v")], np.zeros(2), np.ones(2), ("q", "v"))
    assert (line.name, line.values, line.at) == ("targets", ("q,v", "q,k,v"), "q,v")


def test_lines_pass_through_the_best_mixture() -> None:
    mixture = np.array([0.5, 0.3, 0.2])
    line = surrogate._line(mixture, 0)
    np.testing.assert_allclose(line.sum(1), 1)
    np.testing.assert_allclose(line[20], mixture)
    np.testing.assert_allclose(line[0], [0, 0.6, 0.4])
    np.testing.assert_allclose(surrogate._line(np.array([1.0, 0.0, 0.0]), 0)[0], [0, 0.5, 0.5])
