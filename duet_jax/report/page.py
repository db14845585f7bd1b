"""The report: one HTML page that needs nothing else, from the files of a study."""

from __future__ import annotations

import datetime
import importlib.resources
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from duet_jax import __version__
from duet_jax import config as configs
from duet_jax._files import write
from duet_jax.errors import StudyError
from duet_jax.report import figures
from duet_jax.report.surrogate import Belief, believe
from duet_jax.search.diagnostics import LEVELS, LeftOut
from duet_jax.storage import Place
from duet_jax.study import Study
from duet_jax.trial import Trial, words


def write_report(folder: Place, output: str | Path | None = None) -> Path:
    """Writes the report of a study; the same study gives the same bytes.

    Args:
      folder: the study directory, or its address.
      output: the page's file; None: report.html in the study directory.

    Returns:
      The file written.

    Raises:
      StudyError: there is no study, it is damaged, or the file cannot be written, or it needs a name.
    """
    study = Study.open(folder)
    if output is None and study.remote:
        raise StudyError(f"{study.address} is no folder for the report; give a file: --output FILE.")
    target = study.folder / "report.html" if output is None else Path(output)
    page = render(study)
    try:
        write(target, page)
    except OSError as error:
        raise StudyError(f"The report cannot be written to {target}: {error.strerror}.") from None
    return target


def render(study: Study) -> str:
    """The page's text."""
    trials = study.trials()
    told = [trial for trial in trials if trial.status == "completed"]
    belief = believe(study)
    template = importlib.resources.files("duet_jax.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = _number
    return environment.from_string(template).render(
        study=study,
        version=__version__,
        trials=trials,
        told=told,
        belief=belief,
        best=None if belief is None else told[belief.best],
        noise=_noise(told, belief),
        calibration=None if belief is None or belief.report is None else _calibration(belief.report.left_out),
        legend=list(zip(study.domain_names, figures.colours(len(study.domain_names)), strict=True)),
        drawings=_drawings(study, trials, told, belief),
        chosen={trial.trial: words(trial.settings) for trial in trials},
        columns=list(dict.fromkeys(name for trial in trials for name in words(trial.settings))),
        best_settings=words({} if belief is None else belief.settings),
        seconds={trial.trial: _seconds(trial) for trial in trials},
        config=configs.dump(study.config),
    )


def _drawings(study: Study, trials: Sequence[Trial], told: Sequence[Trial], belief: Belief | None) -> dict[str, Markup]:
    drawn = {}
    if told:
        drawn["feedback"] = figures.feedback(trials)
    if trials:
        drawn["mixtures"] = figures.mixtures(trials, study.domain_names)
    if belief is not None:
        observed = (belief.mixtures, belief.values)
        if belief.slices:
            drawn["slices"] = figures.slices(belief.slices, study.domain_names, observed)
        if belief.along:
            drawn["along"] = figures.along(belief.along)
    if belief is not None and belief.report is not None:
        drawn["noise"] = figures.noise(told, belief.heard, belief.report.noise)
        drawn["effects"] = figures.effects(belief.report.effects, study.domain_names)
        drawn["importance"] = figures.importance(belief.report, study.domain_names)
        if len(told) > 1:
            drawn["left_out"] = figures.left_out(belief.report.left_out)
    if any(figures.gap_of(trial) is not None for trial in trials):
        drawn["gaps"] = figures.gaps(trials)
    metrics = study.metrics()
    if metrics:
        drawn["losses"] = figures.losses(metrics)
    timed = [_seconds(trial) for trial in trials]
    if any(each for each in timed):
        stages = list(dict.fromkeys(name for each in timed for name in each))
        table = {name: [each.get(name, 0.0) for each in timed] for name in stages}
        drawn["timings"] = figures.timings(trials, table)
    # Our own drawings; matplotlib has escaped every name in them.
    return {name: Markup(text) for name, text in drawn.items()}


def _seconds(trial: Trial) -> dict[str, float]:
    """Wall time of a trial's stages: until it was trained, and from then until its feedback was told."""
    ends = [trial.times.get(name) for name in ("proposed", "trained", "told")]
    moments = [None if end is None else datetime.datetime.fromisoformat(end) for end in ends]
    spans = {}
    for name, start, end in zip(("training", "feedback"), moments, moments[1:], strict=False):
        if start is not None and end is not None:
            spans[name] = max((end - start).total_seconds(), 0.0)
    return spans


def _noise(told: Sequence[Trial], belief: Belief | None) -> dict[str, float | None] | None:
    if belief is None or belief.report is None:
        return None
    stated = sorted(t.feedback["stderr"] for t in told if t.feedback and t.feedback["stderr"] is not None)
    return {"learned": belief.report.noise, "stated": stated[len(stated) // 2] if stated else None}


def _calibration(found: LeftOut) -> dict[str, Any]:
    """How many values lie within their intervals, and how many should; the mean log density."""
    count = len(found.values)
    counts = [
        {"level": f"{100 * level:.0f} %", "inside": round(share * count), "expected": f"{level * count:.1f}"}
        for level, share in zip(LEVELS, found.coverage.tolist(), strict=True)
    ]
    return {"count": count, "counts": counts, "log_density": float(found.log_density.mean())}


def _number(value: Any, digits: int = 4) -> str:
    """A number for people; a dash for none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}"
