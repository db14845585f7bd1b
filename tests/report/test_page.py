"""The report: one page that loads nothing, escapes everything, and is the same for the same study."""

from __future__ import annotations

import functools
import html
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from markupsafe import escape

from duet_jax import recall
from duet_jax.errors import StudyError
from duet_jax.report import figures, page, surrogate, write_report
from duet_jax.report.surrogate import believe
from duet_jax.search import Choice, Constraints, Number, Search, Subset
from duet_jax.search.diagnostics import diagnose, difference
from duet_jax.study import Study
from tests.report.seen import Seen, check_that_nothing_is_loaded_or_run


@pytest.mark.usefixtures("stand")
@pytest.mark.parametrize("told", [0, 1, 2, 7])
def test_a_page_loads_nothing_and_runs_nothing(
    tmp_path: Path, told: int, make_study: Any, names: tuple[str, ...]
) -> None:
    study = make_study(tmp_path / "study", told)
    path = write_report(study.folder)
    assert path == study.folder / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Seen(text)
    check_that_nothing_is_loaded_or_run(page)
    assert not re.search(r"url\((?!#)|@import", text)
    assert ("So few scores give a first guess" in page.text) == (told in (1, 2))
    assert ("No score yet" if told == 0 else "gain over equal shares") in page.text
    # Whoever reads sees the names as they are.
    assert all(name in page.text for name in names)
    assert "<script>bad()</script>" in page.text


def test_ids_occur_once_and_references_lead_somewhere(seven: tuple[Study, str]) -> None:
    _, text = seven
    elements = Seen(text).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', text)) <= set(ids)
    # Four domains have a panel each in two of the ten figures.
    assert sum(tag == "svg" for tag, _ in elements) == 8 + 2 * 4


@pytest.mark.usefixtures("stand")
def test_the_same_study_gives_the_same_bytes(tmp_path: Path, make_study: Any) -> None:
    study = make_study(tmp_path / "study", 1)
    first = write_report(study.folder).read_bytes()
    assert write_report(study.folder, tmp_path / "again.html").read_bytes() == first


def test_the_page_says_what_was_trained_on_and_what_it_cost(seven: tuple[Study, str]) -> None:
    text = Seen(seven[1]).text
    for words in (
        "7 of 12 rounds have a score , 1 failed and has none.",
        "98,765",
        "is repeated",
        "3 examples were cut to 256 tokens",
        "Round 7 failed: <script>bad()</script>.",
        "The score is minus the mean loss of the task's responses, in nats per token",
        "the noise it has learned, 0.12 (mixtures differ by about 0.75",
        "Stated with the scores (median standard error): 0.05",
        "What the scores are made of round task_0 task_1 8 0.125 0.875",
        "trainings 6 of 100 examples each",
        "device time 40 min 2400 device-seconds of training (of a resumed one its last run) on 4 devices",
        "tokens trained on 592,590",
    ):
        assert words.replace(" ,", ",") in text.replace(" ,", ","), words


def drawing(page: str, title: str) -> str:
    """The text of one drawing, "" if the page has none of that title."""
    found = re.search(rf'<svg [^>]*aria-label="{re.escape(str(escape(title)))}">.*?</svg>', page, re.DOTALL)
    return found[0] if found else ""


def test_the_page_says_which_mixture_to_use_and_how_sure_that_is(seven: tuple[Study, str]) -> None:
    study, page = seven
    text = Seen(page).text
    best = max(study.completed(), key=lambda trial: trial.feedback["value"])
    # What can be copied is what a selection's configuration takes.
    (line,) = re.findall(r'<pre class="copy">mixture: (.*?)</pre>', page)
    copied = yaml.safe_load(html.unescape(line))
    assert sum(copied.values()) == pytest.approx(1, abs=1e-12)
    assert copied == pytest.approx({name: share for name, share in best.mixture.items() if share > 0}, abs=1.1e-4)
    gain = best.feedback["value"] - study.trials()[0].feedback["value"]
    assert f"gain over equal shares {gain:.2f} 95 %: {gain - 0.49:.2f} to {gain + 0.49:.2f}" in text
    assert ("It is better than equal shares" in text) == (gain > 1.96 * 0.25)
    assert f"in round {best.trial + 1}" in text


def test_the_page_says_which_domains_matter_and_whether_to_believe_it(
    seven: tuple[Study, str], names: tuple[str, ...]
) -> None:
    _, page = seven
    for name in names:
        assert drawing(page, f"average predicted score by share: {name}").count("<path") > 4
        assert drawing(page, f"predicted score through the best mixture: {name}")
    assert drawing(page, "each score predicted from all others")
    text = Seen(page).text
    # The main effects of the stand-in rise from 0 to 1; the domain that explains most comes first.
    cells = r'<td class="text">([^<]*)</td><td>(\d+)&nbsp;%</td><td class="meter">'
    assert re.findall(cells, page) == [("more is better", part) for part in ("80", "70", "60", "50")]
    assert "of 7 scores, each predicted from all others, 0 within the 50 % interval (3.5 expected);" in text
    assert "7 within the 95 % interval (6.7 expected)." in text or "(6.6 expected)." in text
    assert "The mean log density is -1.25 nats." in text


@pytest.mark.usefixtures("stand")
def test_gaps_are_drawn_where_proposals_have_them(tmp_path: Path, make_study: Any) -> None:
    title = "Frank-Wolfe gap of each proposal"
    with_gaps = make_study(tmp_path / "with", 4)
    assert [figures.gap_of(trial) for trial in with_gaps.trials()] == [None, None, 1e-6, 0.0, 1e-9, None]
    drawn = drawing(write_report(with_gaps.folder).read_text(encoding="utf-8"), title)
    assert drawn.count("<use ") >= 3 and "1e\N{MINUS SIGN}12" in drawn
    without = make_study(tmp_path / "without", 1, waiting=0)
    page = write_report(without.folder).read_text(encoding="utf-8")
    assert not drawing(page, title) and "Certificate" not in page
    # One score alone is predicted from nothing, and tells nothing of domains.
    assert "Whether to believe" not in page and "One score alone says nothing of that" in page


@pytest.mark.usefixtures("stand")
def test_few_domains_and_many_domains(tmp_path: Path, make_study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MOST", 4)
    for count, tried in ((2, []), (3, ["in a triangle"]), (25, ["one line each"])):
        names = tuple(f"domain {i}" for i in range(count))
        study = make_study(tmp_path / f"study{count}", 2, names=names)
        text = write_report(study.folder).read_text(encoding="utf-8")
        assert all(name in text for name in names)
        assert re.findall('aria-label="mixtures that were tried, (.*?)"', text) == tried
        assert text.count('aria-label="average predicted score by share: ') == min(count, 4)
        assert ("of 25 domains the 4 that explain most" in text) == (count == 25)
        # Of many domains the first rows are to be seen at once: of the mixture, and of what each domain does.
        assert re.findall(r"<summary>(\d+) more domains</summary>", text) == (["13"] * 2 if count == 25 else [])


def test_a_report_that_cannot_be_written(tmp_path: Path, make_study: Any) -> None:
    study = make_study(tmp_path / "study", 0)
    with pytest.raises(StudyError, match="The report cannot be written to .*none"):
        write_report(study.folder, tmp_path / "none" / "report.html")
    with pytest.raises(StudyError, match="There is no study in"):
        write_report(tmp_path / "none")


# Equal searches share what they have compiled.
CACHED = functools.cache(Search)


@pytest.mark.parametrize("told", [0, 1, 2, 6])
def test_the_belief_is_that_of_the_search(
    tmp_path: Path, told: int, monkeypatch: pytest.MonkeyPatch, make_study: Any
) -> None:
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
    if belief.best == 0:
        assert belief.gain == (0.0, 0.0)
    else:
        assert belief.gain == difference(search, state, mixture, np.full(3, 1 / 3), {})
        assert belief.gain[0] == pytest.approx(mean - belief.uniform[0], abs=1e-9)
    everywhere, predicted = belief.field
    np.testing.assert_allclose(everywhere.sum(1), 1)
    np.testing.assert_allclose(predicted, search.predict(state, everywhere)[0], rtol=1e-9)
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
