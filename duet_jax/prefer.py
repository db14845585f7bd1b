"""A preference training: pairs of responses in, a model that prefers the chosen ones out.

Written into a folder are
  config.yaml      the configuration; the folder takes no other one, but for more iterations of self-play
  metrics.jsonl    a line a training step and, with "split": "validation", one for the held-out pairs after each epoch;
                   what is since the last checkpoint comes by again after a crash, with the same numbers
  results.json     what came out: of each iteration held-out pairs and beta_eff, versions, what was said meanwhile
  model/           the trained model as a Hugging Face folder, adapters merged
  work/            tokens, reference log-probabilities, replies and checkpoints; a run that was killed goes on from
                   there
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from duet_jax import config as configs
from duet_jax._decode import encode as plain
from duet_jax._files import alone, append_lines, write
from duet_jax.config import PreferenceConfig
from duet_jax.data import Encoded
from duet_jax.data.preferences import Pairs, differing, join_pairs, load_pairs, pair
from duet_jax.display import Display
from duet_jax.errors import DataError, ModelError, StudyError
from duet_jax.feedback import Deployed
from duet_jax.loading import Loaded, load
from duet_jax.selection import Pool
from duet_jax.selection.losses import losses
from duet_jax.self_play import check_prompts, replies
from duet_jax.training.preference import effective_beta, measure
from duet_jax.training.preference_trainer import PairReport, PreferenceTrainer, Tuned
from duet_jax.training.steps import TrainState

# What of a configuration may change between two runs into one folder.
MAY_CHANGE = ("spin.iterations",)


def prefer(config: PreferenceConfig, folder: Path, quiet: bool = False) -> dict[str, Any]:
    """Trains on pairs of responses, or goes on where an earlier run into `folder` was stopped.

    Returns:
      What is in results.json.

    Raises:
      ConfigError, DataError, ModelError: the first mistake found, or a loss that is not finite.
      StudyError: another process is at work in this folder, or it is of another configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    said: list[str] = []
    with alone(folder, "trains on preferences in"), Display(1, quiet=quiet) as display:

        def say(line: str) -> None:
            said.append(line)
            display.say(line)

        _check_folder(config, folder)
        job = _prepare(config, folder, display, say)
        write(folder / "config.yaml", configs.dump(config))
        model, results = job.run()
        model.export(folder / "model")
        about = {
            "config": plain(config),
            "model": {"source": job.loaded.model.source, "fingerprint": job.loaded.model.fingerprint},
            "iterations": results,
            "versions": {name: importlib.metadata.version(name) for name in ("duet_jax", "jax", "numpy")},
        }
        say(f"the trained model is in {folder / 'model'}")
        write(folder / "results.json", json.dumps({**about, "log": said}, indent=1, ensure_ascii=False) + "\n")
    return about


def _check_folder(config: PreferenceConfig, folder: Path) -> None:
    """Raises a StudyError if another configuration was run into the folder."""
    path = folder / "config.yaml"
    if path.is_file():
        found = configs.load_preference(path)
        differing = [name for name in configs.differences(found, config) if name not in MAY_CHANGE]
        if differing:
            raise StudyError(
                f"The training in {folder} was started with another configuration; these fields differ: "
                f"{', '.join(differing)}. Give another folder with --output, or the old values."
            )


class _Stand(NamedTuple):
    """How far a training has come: the state of its parameters, and what tells that model from all others."""

    state: TrainState
    identity: str


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    """What all iterations of a training share.

    Attributes:
      config: the configuration.
      folder: where everything is written.
      display, say: for progress, and for news.
      loaded: the model.
      trainer: its training on pairs, compiled once for all iterations.
      chosen: training and held-out examples with the chosen responses.
      pairs: training and held-out pairs; None: rejected responses are sampled.
    """

    config: PreferenceConfig
    folder: Path
    display: Display
    say: Callable[[str], None]
    loaded: Loaded
    trainer: PreferenceTrainer
    chosen: tuple[Encoded, ...]
    pairs: tuple[Pairs, ...] | None

    def run(self) -> tuple[Deployed, list[dict[str, Any]]]:
        """All iterations, of which there is one without self-play: the trained model, and what came out of each."""
        state = self.loaded.trainer.start(jax.random.key(self.config.seed))
        stand = _Stand(state, self.loaded.model.fingerprint)
        results: list[dict[str, Any]] = []
        before: list[Pairs] = []
        for number in range(1 if self.config.spin is None else self.config.spin.iterations):
            train, held_out = self._pairs(stand, number)
            stand, found = self._iteration(stand, number, [train, *before], held_out)
            results.append(found)
            before = [train]
        return self._model(stand.state), results

    def _model(self, state: TrainState) -> Deployed:
        return Deployed(self.loaded.engine, *self.loaded.trainer.deployable(state.trainable))

    def _pairs(self, stand: _Stand, number: int) -> Sequence[Pairs]:
        """Training and held-out pairs of an iteration."""
        if self.pairs is not None:
            return self.pairs
        found, spin = [], self.config.spin
        assert spin is not None
        for part, chosen in enumerate(self.chosen):
            written = replies(
                self._model(stand.state),
                chosen,
                spin,
                stand.identity,
                self.folder / "work",
                seed=int(np.random.SeedSequence([self.config.seed, number, part]).generate_state(1)[0]),
                on_progress=partial(self.display.work, f"iteration {number + 1}, replies"),
            )
            found.append(Pairs(chosen, written))
        return found

    def _reference(self, stand: _Stand, pairs: Pairs) -> np.ndarray:
        """Log-probabilities under the model as it stands, float64 `[n, 2]`, computed once and kept."""
        trainer, fingerprint = self.loaded.trainer, self.loaded.model.fingerprint
        pool = Pool(("pairs",), (), (), (), trainer, fingerprint, self.config.seed, on_progress=self.display.work)
        model, found = self._model(stand.state), []
        for part in (pairs.chosen, pairs.rejected):
            given = losses(pool, part, model.params, model.lora, stand.identity, self.folder / "work", "reference").sums
            for row in np.flatnonzero(~np.isfinite(given))[:1]:
                raise ModelError(
                    f"The reference gives a response of '{part.ids[row]}' the loss {given[row]}, no number."
                )
            found.append(-given)
        return np.stack(found, axis=1)

    def _iteration(
        self, stand: _Stand, number: int, parts: list[Pairs], held_out: Pairs
    ) -> tuple[_Stand, dict[str, Any]]:
        config, pairs = self.config, join_pairs(parts)
        reference = np.concatenate([self._reference(stand, part) for part in parts])
        held_out_reference = self._reference(stand, held_out)
        beta, size = effective_beta(config.loss, reference), float(np.abs(reference).mean())
        cut = pairs.both.truncated
        self.say(
            f"{len(pairs)} pairs, {len(held_out)} held out; {cut} of {2 * len(pairs)} responses are cut at "
            f"{config.data.max_length} tokens; {config.loss.kind} with beta {config.loss.beta:g}, "
            f"which is {beta:.3g} a nat where |log pi_ref| is its mean, {size:.1f} nats"
        )
        place = f"iteration {number + 1}, " if config.spin else ""
        validated: dict[int, dict[str, float | None]] = {}

        def measured(state: TrainState) -> dict[str, float | None]:
            rows = config.training.micro_batch_size or config.training.batch_size
            log_probs = self._model(state).log_probs(held_out.both, rows).reshape(2, -1).T
            return measure(config.loss, log_probs, held_out_reference, held_out.response_tokens)

        def on_epoch(steps: int, state: TrainState) -> None:
            if len(held_out):
                validated[steps] = measured(state)
                self._note({"iteration": number, "split": "validation", "step": steps, **validated[steps]})

        def on_step(report: PairReport) -> None:
            self.display.work(f"{place}training", report.step, report.steps)
            row = dataclasses.asdict(report)
            self._note({"iteration": number, "split": "train", **row.pop("measured"), **row})

        tuned = self.trainer.fit(
            pairs,
            reference,
            stand.state,
            seed=config.seed + number,
            identity={"model": stand.identity},
            folder=self.folder / "work" / f"checkpoints-{number}",
            on_step=on_step,
            on_epoch=on_epoch,
        )
        stand = self._after(stand, pairs, tuned)
        found = validated.get(tuned.steps)
        if found is None and len(held_out):
            # An earlier run finished this training, and noted it.
            found = measured(stand.state)
        if found is not None:
            self.say(f"{place}held-out pairs: {_words(found)}")
        return stand, {
            "pairs": len(pairs),
            "held_out": len(held_out),
            "cut": cut,
            "mean_reference": size,
            "beta_eff": beta,
            "steps": tuned.steps,
            "loss": tuned.loss,
            "seconds": tuned.seconds,
            "validation": found,
        }

    def _after(self, stand: _Stand, pairs: Pairs, tuned: Tuned) -> _Stand:
        trainer = self.loaded.trainer
        settings = [repr(trainer.settings), repr(self.config.loss), str(jnp.dtype(trainer.compute_dtype))]
        whole = [stand.identity, pairs.digest, *settings, trainer.buckets, self.config.seed]
        return _Stand(trainer.restart(tuned.trainable), hashlib.sha256(json.dumps(whole).encode()).hexdigest())

    def _note(self, row: dict[str, Any]) -> None:
        append_lines(self.folder / "metrics.jsonl", [row])


def _prepare(config: PreferenceConfig, folder: Path, display: Display, say: Callable[[str], None]) -> _Job:
    """Reads the data, then the model; tells what is wrong with them before anything is computed."""
    domains = load_pairs(config.data, config.seed)
    kept = folder / "work" / "data"
    loaded = load(config.model, config.data.reading, config.training, domains, (), config.seed, say, folder=kept)
    chosen, *others = (
        (train, loaded.encode(domain.validation, f"{domain.name} (validation)"))
        for domain, train in zip(domains, loaded.train, strict=True)
    )
    pairs = None if not others else _usable(chosen, others[0], config.data.max_length, say)
    if config.spin is not None:
        for part in chosen:
            check_prompts(loaded.engine, part, config.spin)
    trainer = PreferenceTrainer(loaded.trainer, config.loss)
    return _Job(config, folder, display, say, loaded, trainer, chosen, pairs)


def _usable(
    chosen: tuple[Encoded, ...], rejected: tuple[Encoded, ...], max_length: int, say: Callable[[str], None]
) -> tuple[Pairs, ...]:
    """Training and held-out pairs without those whose responses are the same; how many these are is said."""
    whole = [pair(*both) for both in zip(chosen, rejected, strict=True)]
    found = tuple(differing(pairs) for pairs in whole)
    if same := sum(map(len, whole)) - sum(map(len, found)):
        say(f"{same} pairs are left out, whose two responses are the same within max_length {max_length}")
    if not len(found[0]):
        reason = f"no pair of different responses is left within max_length {max_length}; raise it."
        raise DataError(f"domain 'pairs': {reason}")
    return found


def _words(found: dict[str, float | None]) -> str:
    """What is measured of pairs, on one line."""
    length = found["reward_length"]
    return (
        f"loss {found['loss']:.4f}, accuracy {found['accuracy']:.0%}, margin {found['margin']:.4g}, "
        f"correlation of reward and length {'none' if length is None else f'{length:.2f}'}"
    )
