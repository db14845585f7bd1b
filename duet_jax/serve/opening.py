"""Which trials answer: those that are trained and wait for ratings. Told ones are closed, and the next ones opened."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

import numpy as np

from duet_jax import duet
from duet_jax import job as jobs
from duet_jax.data import Example, encode_prompts
from duet_jax.errors import DuetError
from duet_jax.job import Job
from duet_jax.serve.engine import Closed, Engine, Ticket, settings_of
from duet_jax.serve.ratings import Ratings
from duet_jax.serve.telling import Rule, people_of, tell
from duet_jax.study import Study

# Seconds between looks at the study.
PAUSE = 1.0

logger = logging.getLogger(__name__)


class Opener:
    """Watches a study in a thread of its own, from `start` to `stop`.

    The base model is loaded when the first trial is trained, and once. A checkpoint is read as a resumed run reads it;
    nothing is trained.
    """

    def __init__(
        self, study: Study, ratings: Ratings, rule: Rule | None, rows: int, say: Callable[[str], None]
    ) -> None:
        self._study, self._ratings, self._rule, self._rows, self._say = study, ratings, rule, rows, say
        self._people = people_of(study.config)
        self._job: Job | None = None
        self._engine: Engine | None = None
        self._opened: set[int] = set()
        self._wake, self._stopped = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="duet-trials", daemon=True)
        self._failed: set[int] = set()
        self._said = ""

    def start(self) -> None:
        """Begins to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread and the writing of replies."""
        self._stopped = True
        self._wake.set()
        self._thread.join()
        if self._engine is not None:
            self._engine.stop()

    def wake(self) -> None:
        """Looks now: something has been rated or told."""
        self._wake.set()

    @property
    def open(self) -> tuple[int, ...]:
        """Numbers of the trials whose models answer."""
        return () if self._engine is None else self._engine.open

    def answer(self, number: int, messages: Sequence[dict[str, str]], on_text: Callable[[str, bool], None]) -> Ticket:
        """Queues the reply of a trial's model to a conversation, whose beginning is cut where it is too long.

        Raises:
          Closed: the trial is not open.
          Busy: too many wait.
        """
        if self._job is None or self._engine is None:
            raise Closed
        # A single message is a prompt as training has it; without a chat template longer talk is lines of both.
        prompt = messages[0]["content"] if len(messages) == 1 else tuple(messages)
        model, longest = self._job.engine, self._engine.settings.longest
        found = encode_prompts(
            [Example("chat", prompt, "")], model.model.tokenizer, chat=model.chat, max_length=longest
        )
        return self._engine.ask(number, np.asarray(found.tokens[0], np.int32), on_text)

    def _run(self) -> None:
        while not self._stopped:
            try:
                self._look()
                self._said = ""
            except DuetError as error:
                # Said once, and looked at again: a file that is being copied or locked may be right a moment later.
                if self._said != str(error):
                    self._say(f"error: {error}")
                self._said = str(error)
            except Exception:
                logger.exception("the study can no longer be watched; restart the server")
                return
            self._wake.wait(PAUSE)
            self._wake.clear()

    def _look(self) -> None:
        self._ratings.refresh()
        votes = self._ratings.votes()
        for trial in self._study.trials():
            number, waits = trial.trial, trial.status == "pending" and trial.stage == "trained" and not trial.diverged
            if waits and self._rule is not None:
                given = [vote.stars for vote in votes if vote.trial == number]
                if self._rule.met(given, self._people.stars):
                    told = tell(self._study, self._ratings, number)
                    assert told.feedback is not None
                    self._say(f"trial {number} is told: {told.feedback['value']:.3g} after {len(given)} ratings")
                    waits = False
            if waits and number not in self._opened | self._failed:
                self._try_to_open(number)
            elif not waits and number in self._opened and self._engine is not None:
                self._engine.remove(number)
                self._opened.discard(number)
                self._say(f"trial {number} is closed")

    def _try_to_open(self, number: int) -> None:
        try:
            self._open(number)
        except Exception as error:
            # One checkpoint that cannot be read is no reason to close the other trials.
            self._failed.add(number)
            self._say(f"trial {number} cannot be opened, restart the server to try again: {error}")
            if not isinstance(error, DuetError):
                logger.exception("trial %d cannot be opened", number)

    def _open(self, number: int) -> None:
        if self._job is None:
            self._job = jobs.prepare(self._study.config, self._study.folder, self._say)
        if self._engine is None:
            task, network = self._study.config.task, self._job.model.config
            longest = min(self._job.engine.buckets[-1], network.max_length - task.max_new_tokens)
            self._engine = Engine(settings_of(task, longest, self._rows))
        self._engine.add(number, duet.deployed(self._job, self._study, self._study.trials()[number]))
        self._opened.add(number)
        self._say(f"trial {number} is open")
