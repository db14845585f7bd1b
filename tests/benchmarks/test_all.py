"""`benchmarks/all.py`: every script is run, none for longer than its time-out, and the page shows what is measured."""

from __future__ import annotations

import argparse
import json
import re
import runpy
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import each other as they do when they are run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


FAKE = """
import json, sys
path = sys.argv[sys.argv.index("--output") + 1]
json.dump({"settings": {"size": 3}, "rows": [{"name": "one", "rate": 1234.5}, {"name": "two", "rate": 0.25}],
           "machine": {"cpu": "fake", "cores": 1}, "versions": {"python": "3"}, "commit": "abc"}, open(path, "w"))
"""


def test_every_script_is_run_at_a_small_size_and_says_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    import all as everything

    scripts = {path.stem for path in BENCHMARKS.glob("*.py") if "\n    main()\n" in path.read_text(encoding="utf-8")}
    assert scripts - {"all", "sketching_ours"} == {job.script for job in everything.JOBS}

    class Parsed(Exception):
        pass

    given: list[str] = []
    parse_args = argparse.ArgumentParser.parse_args

    def parse_only(self: argparse.ArgumentParser, *arguments: object) -> argparse.Namespace:
        parse_args(self, given)
        assert self.format_help()
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    for job in everything.JOBS:
        peer = ["--peer-python", "python"] if job.peers else []
        words = job.arguments.format(folder="f", stories="s").split()
        given[:] = [*words, *peer, *([] if "--output" in words else ["--output", "f.json"])]
        with pytest.raises(Parsed):
            runpy.run_path(str(BENCHMARKS / f"{job.script}.py"), run_name="__main__")


def test_what_fails_or_takes_too_long_is_told_and_the_others_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from all import Job, quick

    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "broken.py").write_text("print('before'); raise SystemExit('no such thing')")
    # A child that would outlive the script, and write.
    child = f"import time; time.sleep(3); open({str(tmp_path / 'late')!r}, 'w')"
    (tmp_path / "slow.py").write_text(f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])\n")
    jobs = [
        Job("fake", "--size 3", 60, (), ("no_such_package",)),
        Job("broken", "", 60),
        Job("slow", "", 1),
        Job("absent", "", 60, ("no_such_package",)),
    ]
    began = time.monotonic()
    assert not quick(jobs, tmp_path / "out", sys.executable, scripts=tmp_path)
    said = capsys.readouterr().out
    assert re.search(r"fake +ours alone: .* has no no_such_package\nfake +\d+ s  done", said)
    assert "failed with status 1" in said and "no such thing" in said
    assert "ended after 1 s, its time-out" in said
    assert "absent               left out: there is no no_such_package" in said
    page = (tmp_path / "out" / "results.md").read_text()
    assert "python benchmarks/fake.py --size 3" in page
    assert "| name | rate |\n| --- | ---: |\n| one | 1234 |\n| two | 0.25 |" in page
    assert "*fake, 1 cores; python 3; commit abc.*" in page
    time.sleep(max(0.0, began + 5.5 - time.monotonic()))
    assert not (tmp_path / "late").exists()


def test_the_page_of_results_is_what_the_results_say() -> None:
    import page

    found = page.read(BENCHMARKS / "results")
    kept = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert kept == page.text(found), "run: python benchmarks/all.py --page"
    for name in re.findall(r"\(figures/(\w+)\.svg\)", kept):
        assert (ROOT / "docs" / "figures" / f"{name}.svg").is_file()


def test_an_unknown_result_is_shown_whole() -> None:
    import page

    data = {"parts": {"a": {"x": 1.5, "pair": [0.5, 0.25]}}, "answer": 7, "machine": {"cpu": "c", "cores": 2}}
    shown = page.section("unheard", json.loads(json.dumps(data)))
    assert "| answer |\n| ---: |\n| 7 |" in shown
    assert "| name | x | pair |\n| --- | ---: | ---: |\n| a | 1.5 | 0.5 ± 0.25 |" in shown
