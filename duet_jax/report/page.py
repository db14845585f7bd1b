"""The report: one HTML page that needs nothing else, from the files of a study."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from duet_jax import __version__
from duet_jax import config as configs
from duet_jax.errors import StudyError
from duet_jax.report import figures, tried, words
from duet_jax.report.costs import cost, spans
from duet_jax.report.document import document, save
from duet_jax.report.drawing import colours
from duet_jax.report.surrogate import Belief, believe
from duet_jax.search.constraints import Constraints, round_counts
from duet_jax.search.diagnostics import LEVELS, LeftOut, Report
from duet_jax.storage import Place
from duet_jax.study import Study
from duet_jax.trial import Trial
from duet_jax.trial import words as settings_in_words

# Domains that have drawings of their own.
MOST = 12


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
    return save(target, render(study))


def render(study: Study) -> str:
    """The page's text."""
    trials, metrics = study.trials(), study.metrics()
    told = [trial for trial in trials if trial.status == "completed"]
    belief = believe(study)
    values = [] if belief is None else belief.values.tolist()
    parts = _parts(told)
    return document(
        "page.html",
        study=study,
        version=__version__,
        trials=trials,
        told=told,
        waiting=sum(trial.status == "pending" for trial in trials),
        failed=sum(trial.status in ("failed", "abandoned") for trial in trials),
        score=words.score(study.config.task),
        lowest=min(values, default=None),
        highest=max(values, default=None),
        belief=belief,
        **_best(study, told, belief),
        domains=_domains(study, belief),
        most=""
        if len(study.domain_names) <= MOST
        else f"; of {len(study.domain_names)} domains the {MOST} that explain most",
        noise=_noise(told, belief),
        calibration=None if belief is None or belief.report is None else _calibration(belief.report.left_out),
        legend=list(zip(study.domain_names, colours(len(study.domain_names)), strict=True)),
        drawings=_drawings(study, trials, told, belief, metrics),
        chosen={trial.trial: settings_in_words(trial.settings) for trial in trials},
        columns=list(dict.fromkeys(name for trial in trials for name in settings_in_words(trial.settings))),
        spans={trial.trial: spans(trial) for trial in trials},
        parts=parts,
        part_names=list(dict.fromkeys(name for part in parts.values() for name in part)),
        validated={t.trial: found for t in trials if (found := (t.training or {}).get("validation_loss"))},
        cost=cost(trials, metrics),
        config=configs.dump(study.config),
    )


def _best(study: Study, told: Sequence[Trial], belief: Belief | None) -> dict[str, Any]:
    """The best mixture: its rows, largest share first, how it can be copied, and how sure it is."""
    if belief is None:
        return {"best": None, "best_settings": {}}
    best, gain = told[belief.best], belief.gain
    mean, stderr = float(belief.mean[belief.best]), float(belief.stderr[belief.best])
    names, shares = study.domain_names, belief.mixtures[belief.best]
    rows = [
        {
            "name": spec.name,
            "share": share,
            "colour": colour,
            "count": best.counts.get(spec.name),
            "source": spec.source,
        }
        for spec, share, colour in zip(study.config.data.domains, shares.tolist(), colours(len(names)), strict=True)
        if share > 0
    ]
    # Shares of four digits that sum to one.
    rounded = round_counts(shares, 10_000, Constraints()) / 10_000
    copied = {name: share for name, share in zip(names, rounded.tolist(), strict=True) if share > 0}
    selector = study.config.selector
    return {
        "best": best,
        "best_settings": settings_in_words(belief.settings),
        "best_rows": sorted(rows, key=lambda row: -row["share"]),
        "unused": [name for name, share in zip(names, shares, strict=True) if share <= 0],
        "copied": json.dumps(copied, ensure_ascii=False),
        "sizes": study.sizes(),
        "picked": f"Examples within a domain: {words.RULES[selector.rule]}; an example's utility is "
        f"{words.UTILITIES[selector.kind]}."
        if selector.kind != "random"
        else "Examples within a domain are drawn at random.",
        "told_mean": words.to(mean, stderr),
        "told_interval": words.interval(mean, stderr),
        "uniform_mean": words.to(*belief.uniform),
        "uniform_interval": words.interval(*belief.uniform),
        "gain_mean": words.to(*gain) if gain[1] else "0",
        "gain_interval": words.interval(*gain) if gain[1] else None,
        "verdict": words.verdict(gain),
    }


def _domains(study: Study, belief: Belief | None) -> list[dict[str, Any]]:
    """What each domain does, the one that explains most first."""
    if belief is None or belief.report is None or not belief.slices or len(belief.values) < 2:
        return []
    found, lines, names = belief.report, belief.slices, study.domain_names
    return [
        {
            "name": names[row],
            "colour": colours(len(names))[row],
            "importance": float(found.effects.importance[row]),
            "relevance": float(found.relevance[row]),
            "here": words.direction(lines[row].shares, lines[row].mean, lines[row].stderr),
            "average": words.direction(found.effects.shares[row], found.effects.mean[row], found.effects.stderr[row]),
        }
        for row in _order(found)
    ]


def _order(found: Report) -> list[int]:
    """Domains, the one that explains most first."""
    return np.argsort(-found.effects.importance, kind="stable").tolist()


def _parts(told: Sequence[Trial]) -> dict[int, dict[str, float]]:
    """Numbers that came with the scores and are more than the scores again."""
    found = {}
    for trial in told:
        feedback = trial.feedback or {}
        details = dict(feedback.get("details") or {})
        if any(abs(value) != abs(feedback["value"]) for value in details.values()):
            found[trial.trial] = details
    return found


def _drawings(
    study: Study,
    trials: Sequence[Trial],
    told: Sequence[Trial],
    belief: Belief | None,
    metrics: Sequence[Mapping[str, Any]],
) -> dict[str, Markup]:
    drawn, names = {}, study.domain_names
    if told:
        drawn["feedback"] = figures.feedback(trials)
    if trials and len(names) > 1:
        drawn["mixtures"] = figures.mixtures(trials, names)
    if belief is not None and len(names) > 2:
        open_ = [[trial.mixture[name] for name in names] for trial in trials if trial.status == "pending"]
        shown = (belief.mixtures, belief.values, belief.best, names, np.reshape(open_, (-1, len(names))))
        if belief.field is not None:
            drawn["ternary"] = tried.ternary(*shown, belief.field)
        else:
            drawn["parallel"] = tried.parallel(*shown)
    if belief is not None and belief.along:
        drawn["along"] = figures.along(belief.along)
    if belief is not None and belief.report is not None:
        most = _order(belief.report)[:MOST]
        drawn["noise"] = figures.noise(told, belief.heard, belief.report.noise)
        if belief.slices and len(told) > 1:
            drawn["slices"] = figures.slices(belief.slices, names, (belief.mixtures, belief.values), most)
            drawn["effects"] = figures.effects(belief.report.effects, names, most)
        if len(told) > 1:
            drawn["left_out"] = figures.left_out(belief.report.left_out)
    if any(figures.gap_of(trial) is not None for trial in trials):
        drawn["gaps"] = figures.gaps(trials)
    if metrics:
        drawn["losses"] = figures.losses(metrics)
    timed = [spans(trial) for trial in trials]
    if any(each for each in timed):
        stages = list(dict.fromkeys(name for each in timed for name in each))
        drawn["timings"] = figures.timings(trials, {name: [each.get(name, 0.0) for each in timed] for name in stages})
    # Our own drawings, in which every name is escaped.
    return {name: Markup(text) for name, text in drawn.items()}


def _noise(told: Sequence[Trial], belief: Belief | None) -> dict[str, float | None] | None:
    if belief is None or belief.report is None:
        return None
    stated = sorted(t.feedback["stderr"] for t in told if t.feedback and t.feedback["stderr"] is not None)
    return {"learned": belief.report.noise, "stated": stated[len(stated) // 2] if stated else None}


def _calibration(found: LeftOut) -> dict[str, Any] | None:
    """How many values lie within their intervals, and how many should; the mean log density. None of one alone."""
    count = len(found.values)
    if count < 2:
        return None
    counts = [
        {
            "level": words.percent(level),
            "inside": round(share * count),
            "expected": f"{level * count:.1f}",
        }
        for level, share in zip(LEVELS, found.coverage.tolist(), strict=True)
    ]
    return {"count": count, "counts": counts, "log_density": float(found.log_density.mean())}
