"""What the owner sees and decides: ratings of each trial, raters, when to tell, and the report."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from duet_jax.errors import FeedbackError
from duet_jax.search import mean_rating
from duet_jax.serve.chat import Replies
from duet_jax.serve.guard import Guard, Refusal, body
from duet_jax.serve.limits import Rate
from duet_jax.serve.panel import Panel, estimate
from duet_jax.serve.ratings import Ratings, Vote, check, is_whole
from duet_jax.serve.telling import people_of, rated, raters, tell
from duet_jax.serve.tokens import Tokens
from duet_jax.study import Study

# The report has its drawings and styles in itself, and no script.
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"

# Ratings that programs may report of one trial, in a second and at once.
PER_SECOND, AT_ONCE = 200.0, 400


class Owner:
    """The owner's part of the application, and the door for ratings from other programs."""

    def __init__(self, study: Study, ratings: Ratings, tokens: Tokens, guard: Guard, replies: Replies) -> None:
        self._study, self._ratings, self._tokens, self._guard, self._replies = study, ratings, tokens, guard, replies
        self._people = people_of(study.config)
        self._reported = Rate(PER_SECOND, AT_ONCE)
        self._panel: tuple[list[Vote], Panel | None] = ([], None)
        self._panel_lock = threading.Lock()

    async def report_rating(self, request: Request) -> Response:
        """Takes a rating from a program that has the trial's token."""
        sent = await body(request)
        number = sent.get("trial")
        if number is None or not is_whole(number) or number < 0:
            raise Refusal(422, "The field trial must be the number of a trial, from 0.")
        self._guard.require_trial(request, int(number))
        wait = self._reported.wait(str(int(number)))
        if wait:
            raise Refusal(429, "Ratings of this trial come too fast; try again.", wait)
        vote = check(sent, self._people.stars, "api")
        try:
            (fresh,) = await run_in_threadpool(self._ratings.add, [vote], partial(rated, self._study))
        except FeedbackError as error:
            raise Refusal(409, str(error)) from None
        self._replies.wake()
        return JSONResponse({"new": fresh})

    async def summary(self, request: Request) -> Response:
        """All that the page shows."""
        self._guard.require(request, "owner")
        return JSONResponse(await run_in_threadpool(self._summary))

    async def tell(self, request: Request) -> Response:
        """Tells a trial what its ratings say."""
        self._guard.require(request, "owner")
        number = (await body(request)).get("trial")
        if not isinstance(number, int) or isinstance(number, bool):
            raise Refusal(422, "The field trial must be the number of a trial.")
        try:
            await run_in_threadpool(rated, self._study, number)
            told = await run_in_threadpool(tell, self._study, self._ratings, number)
        except FeedbackError as error:
            raise Refusal(409, str(error)) from None
        self._replies.wake()
        return JSONResponse({"feedback": dict(told.feedback or {})})

    async def exclude(self, request: Request) -> Response:
        """Leaves a rater out, or takes one in again."""
        self._guard.require(request, "owner")
        sent = await body(request)
        rater, excluded = sent.get("rater"), sent.get("excluded")
        votes = await run_in_threadpool(self._ratings.all_votes)
        if not isinstance(rater, str) or rater not in {vote.rater for vote in votes} or not isinstance(excluded, bool):
            raise Refusal(422, "The fields must be rater, one that has rated, and excluded, true or false.")
        await run_in_threadpool(self._ratings.exclude, rater, excluded)
        self._replies.wake()
        return JSONResponse({"rater": rater, "excluded": excluded})

    async def report(self, request: Request) -> Response:
        """The study's report, made anew."""
        self._guard.require(request, "owner")

        def made() -> str:
            from duet_jax.report.page import render

            return render(self._study)

        return HTMLResponse(await run_in_threadpool(made), headers={"content-security-policy": REPORT_POLICY})

    def _summary(self) -> dict[str, Any]:
        self._ratings.refresh()
        votes, excluded, stars = self._ratings.votes(), self._ratings.excluded, self._people.stars
        panel = self._believed()
        trials = self._study.trials()
        open_ = [trial.trial for trial in trials if trial.status == "pending" and trial.stage != "proposed"]
        best = None if panel is None else panel.trials[int(panel.value.argmax())]
        rows = []
        for trial in trials:
            number = trial.trial
            given = [vote.stars for vote in votes if vote.trial == number]
            row: dict[str, Any] = {
                "trial": number,
                "state": "open" if number in open_ else trial.stage if trial.status == "pending" else trial.status,
                "answers": number in self._replies.open,
                "mixture": dict(trial.mixture),
                "counts": [given.count(star) for star in range(1, stars + 1)],
                "count": len(given),
                "feedback": None if trial.feedback is None else trial.feedback["value"],
            }
            if given and panel is not None and best is not None:
                row["mean"], row["stderr"] = mean_rating(given, stars)
                row["estimate"], row["estimate_stderr"] = panel.of(number)
                row["needed"] = None if number == best else panel.needed(number, best, open_)
                row["best"] = number == best
            if number in open_:
                row["token"] = self._tokens.trial(number)
            rows.append(row)
        return {
            "study": self._study.config.name,
            "rounds": self._study.config.rounds,
            "stars": stars,
            "trials": rows,
            "noise": None if panel is None else panel.noise,
            "spread": None if panel is None else panel.spread,
            "raters": [
                {**vars(rater), "excluded": rater.name in excluded} for rater in raters(self._ratings.all_votes())
            ],
        }

    def _believed(self) -> Panel | None:
        """The panel of the votes that stand, computed anew when there are others."""
        with self._panel_lock:
            votes = self._ratings.votes()
            if votes != self._panel[0]:
                self._panel = votes, estimate(votes, self._people.stars) if votes else None
            return self._panel[1]
