"""Training data with its unlikely targets corrected or left out (CLEAR).

Chen and Mueller 2024 (arXiv 2403.12776): the base model's confidence in every target (section 3, BSDetector) decides
which examples are kept; a model that is trained on these proposes a target for every prompt, and where the base model
judges it better, with enough confidence, it takes the old one's place. The prompts stay as they are.

Ours: the verdict must be the same in both positions (see `curation.correction`). In a further iteration, the model is
trained anew on what the last one left, and its proposals are compared with the targets as they are then; an example to
which nothing happens keeps its decision. Where examples of one prompt would end with different targets, one is taken.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from duet_jax.config import ClearConfig
from duet_jax.curation import audit
from duet_jax.curation.asking import Confidence, confidence, first_of, require_asked, summary
from duet_jax.curation.bench import Bench, Curated, lines
from duet_jax.curation.correction import Verdicts, correctable, decide, judge
from duet_jax.curation.decisions import Action, Decision, auto_filter
from duet_jax.curation.parts import Progress
from duet_jax.curation.respondent import ModelRespondent, Respondent
from duet_jax.data import Example
from duet_jax.data.example import any_chat, as_row
from duet_jax.errors import DataError
from duet_jax.feedback import Deployed


class Round(NamedTuple):
    """What one round of Auto-Correct decided about n examples; verdicts are of the targets as they were before it."""

    decisions: list[Decision]
    verdicts: Verdicts


class Settled(NamedTuple):
    """What becomes of n examples.

    Attributes:
      confidence: in their targets.
      decisions: the last word on each: of the round that last corrected it, or else of the last round.
      rounds: of Auto-Correct, which may be none.
      deciding: int64 `[n]`, which of them the decision is of; -1 where there was none.
      level: groups of which all confidences lie at or below their quantile; see `decisions.auto_filter`.
    """

    confidence: Confidence
    decisions: list[Decision]
    rounds: list[Round]
    deciding: np.ndarray
    level: tuple[str, ...]


def settle(
    ask: Callable[[], Respondent],
    examples: Sequence[Example],
    names: Sequence[str],
    config: ClearConfig,
    folder: Path,
    propose: Callable[[list[Example]], list[str]],
    on_progress: Progress = lambda name, done, of: None,
) -> Settled:
    """Decides about every example.

    Args:
      ask: gives the base model; nothing of it is kept while another one is trained.
      examples: n of them, at least one.
      names: of their domains.
      config: how.
      folder: keeps what was computed.
      propose: one target for each of the n prompts, or "" for none, by a model that is trained on the examples it is
        given.
      on_progress: is told a stage, examples done and of how many.

    Raises:
      DataError: no question about any example fits the model's context, before anything is computed; or nothing is
        kept that a model could be trained on.
      DuetError: as `asking.confidence`.
    """
    base = ask()
    sure = confidence(base, examples, config.confidence, folder, on_progress)
    require_asked(examples, sure, base.longest)
    del base
    filtered = auto_filter(
        sure.value,
        [(repr(example.prompt), example.response) for example in examples],
        groups=names if config.scope == "domain" else None,
        quantile=config.quantile,
        threshold=config.threshold,
    )
    raw = decide(examples, sure.value, filtered, eta=config.eta)
    settled, rounds, deciding = raw, [], np.full(len(examples), -1)
    for number in range(config.iterations if config.correct else 0):
        now = [
            dataclasses.replace(example, response=target_of(example, decision))
            for example, decision in zip(examples, raw, strict=True)
        ]
        kept = [e for e, decision in zip(now, settled, strict=True) if decision.action is not Action.DROP]
        if not kept:
            raise DataError(
                f"No target has a confidence above its threshold ({_range([one.threshold for one in settled])}), so "
                f"there is nothing to train a model on that proposes others; lower clear.threshold."
            )
        proposals = propose(kept)
        verdicts = judge(
            ask(),
            now,
            proposals,
            config.confidence,
            folder,
            acceptance=config.acceptance,
            template=config.preference_template,
            on_progress=on_progress,
        )
        found = decide(examples, sure.value, filtered, proposals=proposals, verdicts=verdicts, eta=config.eta)
        rounds.append(Round(found, verdicts))
        for row, decision in enumerate(found):
            if decision.action is Action.CORRECT or raw[row].action is not Action.CORRECT:
                deciding[row] = number
        raw = [raw[row] if at < number else found[row] for row, at in enumerate(deciding.tolist())]
        settled = one_target(examples, raw)
    return Settled(sure, settled, rounds, deciding, filtered.level)


def target_of(example: Example, decision: Decision) -> str:
    """The target that an example has after a decision; that of one that is dropped is its own."""
    if decision.action is not Action.CORRECT:
        return example.response
    assert decision.proposal is not None
    return decision.proposal


def one_target(examples: Sequence[Example], decisions: Sequence[Decision]) -> list[Decision]:
    """The decisions, but that examples with one prompt and different targets are dropped, all but those of one target.

    A target that is kept goes before corrections, for no proposal was better than it; of corrections, that of the most
    confident verdict is taken (the first of equals). What is dropped is `beaten`.
    """
    best: dict[str, tuple[tuple[bool, float], str]] = {}
    for example, decision in zip(examples, decisions, strict=True):
        if decision.action is not Action.DROP:
            kept = decision.action is Action.KEEP
            rank = (kept, decision.confidence if kept else decision.acceptance)
            prompt = repr(example.prompt)
            if prompt not in best or rank > best[prompt][0]:
                best[prompt] = rank, target_of(example, decision)
    return [
        decision
        if decision.action is Action.DROP or target_of(example, decision) == best[repr(example.prompt)][1]
        else decision._replace(action=Action.DROP, beaten=True)
        for example, decision in zip(examples, decisions, strict=True)
    ]


def curate(bench: Bench, config: ClearConfig) -> Curated:
    """Curates all domains.

    Files: for each domain curated-NAME.jsonl (see `file_of`), the kept and the corrected examples, with `messages`
    where a prompt of the domain is a conversation and `prompt` and `response` otherwise, and in the column `clear` what
    was decided; audit.parquet and audit.jsonl, a row for each example of all domains with every number that led to its
    decision (see `curation.audit`); audit.html, a page to look through them. A corrected example has no accepted
    answers and no right choice any more, for these belonged to the old target.

    Nothing is proposed for an example whose prompt, or whose question for the judge, is too long, and a proposal that
    has not ended after `max_new_tokens` tokens is none, for it is a part of an answer.

    Raises:
      DataError: as `settle`, or no example is short enough to be corrected; before anything is computed.
      ConfigError, ModelError, FeedbackError: as `settle`.
    """
    student = bench.student
    names = [domain.name for domain in bench.domains for _ in domain.train]
    examples = [example for domain in bench.domains for example in domain.train]

    def ask() -> ModelRespondent:
        model = Deployed(student.engine, student.trainer.load_base())
        return ModelRespondent(model, student.fingerprint, config.confidence, bench.seed)

    def propose(kept: list[Example]) -> list[str]:
        data = student.engine.encode(kept, "clear")

        @cache
        def trained() -> ModelRespondent:
            return ModelRespondent(bench.trained(data, "training"), "", config.confidence, bench.seed)

        def some(rows: list[int]) -> list[str | None]:
            asked = [short[row] for row in rows]
            found = trained().answers(asked, 0, config.max_new_tokens, config.stop)
            return [own[0].text.strip() if own[0].ended else None for own in found]

        identity = [data.digest, about, [example.prompt for example in short], config.max_new_tokens, list(config.stop)]
        found = bench.kept("proposals", identity, sizes, some)
        if cut := found.count(None):
            bench.say(
                f"clear: {cut} of {len(found)} proposals had not ended after {config.max_new_tokens} tokens and are "
                f"not judged"
            )
        given = iter(found)
        return [(next(given) or "") if there else "" for there in room]

    # The model itself is not kept, while another one is trained.
    base = ask()
    about = base.identity
    # Before anything is computed: a proposal takes as much room as its tokens.
    room = correctable(base, examples, config) if config.correct else np.zeros(len(examples), bool)
    short = [examples[row] for row in np.flatnonzero(room)]
    sizes = base.sizes(short)
    if config.correct and not short:
        raise DataError(
            f"clear: of none of {len(examples)} examples a proposal of up to {config.max_new_tokens} tokens and the "
            f"questions about it fit into the {base.longest} tokens that the model takes; lower clear.max_new_tokens, "
            f"or shorten the templates."
        )
    del base
    if config.correct and len(short) < len(examples):
        long = [example.id for example, there in zip(examples, room, strict=True) if not there]
        bench.say(f"clear: {len(long)} of {len(examples)} examples are too long to be corrected ({first_of(long)})")
    found = settle(ask, examples, names, config, bench.folder / "confidence", propose, bench.on_progress)
    _tell(bench.say, examples, found)
    rows = audit.rows(examples, names, found)
    columns = ("action", "confidence", "threshold", "target", "proposal", "acceptance", "eta")
    files: dict[str, str | bytes] = {
        "audit.jsonl": lines(rows),
        "audit.parquet": audit.parquet(rows),
        "audit.html": audit.page(rows),
    }
    decided = zip(examples, found.decisions, rows, strict=True)
    for domain in bench.domains:
        chat = any_chat(domain.train)
        files[file_of(domain.name)] = lines(
            as_row(_curated(example, decision), chat=chat) | {"clear": {column: row[column] for column in columns}}
            for example, decision, row in islice(decided, len(domain.train))
            if decision.action is not Action.DROP
        )
    return Curated(files, _summary(audit.counts(rows)))


def file_of(domain: str) -> str:
    """The file of a domain's curated examples; a slash in its name is written %2F, and a percent sign %25."""
    return f"curated-{domain.replace('%', '%25').replace('/', '%2F')}.jsonl"


def _curated(example: Example, decision: Decision) -> Example:
    if decision.action is not Action.CORRECT:
        return example
    old = ("answer", "answers", "answer_index")
    meta = {name: value for name, value in example.meta.items() if name not in old}
    return dataclasses.replace(example, response=target_of(example, decision), meta=meta)


def _tell(say: Callable[[str], None], examples: Sequence[Example], found: Settled) -> None:
    say(f"clear: {summary(examples, found.confidence)}")
    say(f"clear: thresholds {_range([decision.threshold for decision in found.decisions])}")
    if found.level:
        say(f"clear: no confidence lies above the quantile of {', '.join(found.level)}; those at it are kept")
    for number, (decisions, verdicts) in enumerate(found.rounds, start=1):
        judged = int((~np.isnan(verdicts.first[:, 0])).sum())
        accepted = sum(decision.action is Action.CORRECT for decision in decisions)
        say(
            f"clear: iteration {number}: {judged} of {len(decisions)} proposals differ from their targets, "
            f"{int(verdicts.better.sum())} are judged better and {accepted} accepted"
        )


def _range(values: Sequence[float]) -> str:
    known = [value for value in values if not np.isnan(value)]
    return " to ".join(f"{value:.3g}" for value in sorted({min(known), max(known)})) if known else "none"


def _summary(counts: Mapping[str, Counter[str]]) -> str:
    def listed(own: Counter[str]) -> str:
        return " · ".join(f"{action} {own[action]}" for action in Action)

    whole = sum(counts.values(), Counter())
    domains = f" ({'; '.join(f'{name}: {listed(own)}' for name, own in counts.items())})" if len(counts) > 1 else ""
    return f"{whole.total()} examples: {listed(whole)}{domains}"
