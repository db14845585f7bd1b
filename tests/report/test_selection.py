"""The page of a selection: what was picked is on it as text, with its numbers, and a damaged one is told."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from duet_jax import cli
from duet_jax.errors import StudyError
from duet_jax.report import selection
from tests.report.seen import Seen, check_that_nothing_is_loaded_or_run


def test_the_page_says_what_was_picked(tmp_path: Path, capsys: pytest.CaptureFixture[str], make_selection: Any) -> None:
    folder = make_selection(tmp_path)
    capsys.readouterr()
    assert cli.main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}/report.html\n"
    raw = (folder / "report.html").read_text(encoding="utf-8")
    text = Seen(raw).text
    assert "24 of 50 training examples were chosen, from 2 domains." in text
    assert "those of the highest utility, from all domains as one." in text
    assert "An example's utility is a number from a file." in text
    rows = [json.loads(line) for line in (folder / "selected.jsonl").read_text().splitlines()]
    of_a = [row for row in rows if row["domain"] == "a"]
    assert 0 < len(of_a) < 24
    # Chosen, of, both shares, median utility of the chosen and of all, and the lowest chosen.
    cells = re.search(r'</span>a</td>(.*?)<td class="text soft source">', raw)[1]
    found = [each.replace("&nbsp;", " ") for each in re.findall(r"<td>(?:<b>)?(.*?)(?:</b>)?</td>", cells)]
    utilities = [row["utility"] for row in of_a]
    median = (
        sorted(utilities)[len(utilities) // 2]
        if len(utilities) % 2
        else sum(sorted(utilities)[len(utilities) // 2 - 1 :][:2]) / 2
    )
    assert found[:4] == [str(len(of_a)), "30", f"{100 * len(of_a) / 24:.1f} %", "60.0 %"]
    assert found[4:7] == [f"{median:.3g}", "1.45", f"{min(utilities):.3g}"]
    assert found[8] == f"{max(len(row['prompt'] + row['response']) for row in rows if row['domain'] == 'a'):,}"
    assert re.search(r"time on the clock [\d.]+ (m?s|min)", text) and "this needed no model" in text
    # The same selection gives the same bytes.
    assert selection.write_selection(folder, tmp_path / "again.html").read_text(encoding="utf-8") == raw


def test_a_page_of_a_selection_loads_nothing_and_runs_nothing(
    tmp_path: Path, make_selection: Any, hostile: str
) -> None:
    page = Seen(selection.render_selection(make_selection(tmp_path)))
    check_that_nothing_is_loaded_or_run(page)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    # Whoever reads sees texts and names as they are.
    assert f"b {hostile}" in page.text and f"{hostile} 30" in page.text


def test_long_texts_are_cut_and_the_page_stays_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_selection: Any
) -> None:
    monkeypatch.setattr(selection, "LONGEST", 200)
    page = Seen(selection.render_selection(make_selection(tmp_path, "count=50")))
    # The last of b, of the highest utility, has 20 times 10 words of 5 characters.
    assert "response, the first 200 of 1,000 characters" in page.text
    assert page.text.count("long") <= 20 * 200 / 5
    shown = [int(place) for place in re.findall(r"(\d+) of 20 · utility", page.text)]
    assert shown[:5] == [1, 2, 3, 4, 5] and shown[-1] == 20 and len(shown) == 10 and shown == sorted(set(shown))


@pytest.mark.parametrize("count", [1, 3, 5, 7, 10, 11, 2000])
def test_examples_are_shown_from_the_first_to_the_last(count: int) -> None:
    shown = selection._sample(count)
    assert shown == sorted(set(shown)) and len(shown) == min(count, 10)
    assert shown[0] == 0 and shown[-1] == count - 1


def test_texts_may_hold_separators_of_lines(tmp_path: Path, make_selection: Any) -> None:
    folder = make_selection(tmp_path)
    first, *others = (folder / "selected.jsonl").read_bytes().split(b"\n")
    row = json.loads(first) | {"response": "one\u2028two\u0085three"}
    text = json.dumps(row, ensure_ascii=False).encode()
    (folder / "selected.jsonl").write_bytes(b"\n".join([text, *others]))
    assert "one\u2028two" in selection.render_selection(folder)


def test_random_examples_have_no_utilities_to_show(tmp_path: Path, make_selection: Any) -> None:
    text = Seen(selection.render_selection(make_selection(tmp_path, "selector={kind: random}", "pooled=false"))).text
    assert "Examples were drawn at random, from each domain by itself, in proportion to its size." in text
    assert "All examples have the same utility." in text and "median utility" not in text


def test_conversations_are_shown_turn_by_turn(tmp_path: Path, make_selection: Any) -> None:
    folder = make_selection(tmp_path)
    path = folder / "selected.jsonl"
    row = json.loads(path.read_text().splitlines()[0])
    turns = [{"role": "system", "content": "<i>be brief</i>"}, {"role": "assistant", "content": "yes"}]
    path.write_text(json.dumps({"id": "c", "domain": "a", "utility": row["utility"], "messages": turns}) + "\n")
    text = Seen(selection.render_selection(folder)).text
    assert "system <i>be brief</i> assistant yes" in text


def test_models_that_were_compared_are_in_a_table(tmp_path: Path, make_selection: Any) -> None:
    folder = make_selection(tmp_path)
    about = json.loads((folder / "selection.json").read_text())
    row = {"examples": 24, "steps": 3, "loss": 1.5, "stderr": 0.25, "details": {}, "seconds": 61.0}
    about["evaluation"] = [
        {"name": "selected", "score": -1.25, **row},
        {"name": "none", "score": None, **row, "loss": None, "stderr": None},
    ]
    about |= {"model": {"source": "<tiny>"}, "cost": {"seconds": 30.0, "devices": 4, "tokens": 123456}}
    (folder / "selection.json").write_text(json.dumps(about))
    text = Seen(selection.render_selection(folder)).text
    assert (
        "the chosen examples -1.25 ± 0.25 24 3 1.5 1 min 1 s nothing: the base model as it is – 24 3 – 1 min 1 s"
        in text
    )
    assert "models compared 2 min 2 s training and scoring 2" in text
    assert "devices 4 120 device-seconds tokens of all examples 123,456 model: <tiny>" in text


def test_what_is_missing_or_damaged_is_told_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make_selection: Any
) -> None:
    folder = make_selection(tmp_path)
    with pytest.raises(StudyError, match="The report cannot be written to .*none"):
        selection.write_selection(folder, tmp_path / "none" / "report.html")
    (folder / "selected.jsonl").write_text('{"id": ')
    with pytest.raises(StudyError, match=r"The selection in .*out is damaged \(.*\); run duet select again\."):
        selection.render_selection(folder)
    (folder / "selected.jsonl").write_text("")
    with pytest.raises(StudyError, match="selected.jsonl is empty"):
        selection.render_selection(folder)
    (folder / "scores.parquet").unlink()
    with pytest.raises(StudyError, match="There is no selection in .*, or a part of one: .*scores.parquet is missing"):
        selection.render_selection(folder)
    capsys.readouterr()
    assert cli.main(["report", str(folder)]) == 2 and "scores.parquet is missing" in capsys.readouterr().err
