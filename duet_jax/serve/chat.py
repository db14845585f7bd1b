"""What testers' browsers ask for: a conversation with a model they are not told, streamed answers, ratings."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from duet_jax._files import append_lines
from duet_jax.errors import FeedbackError, StudyError
from duet_jax.serve.conversations import Conversation, Conversations
from duet_jax.serve.engine import Busy, Closed, Ticket
from duet_jax.serve.guard import Guard, Refusal, body
from duet_jax.serve.limits import Rate
from duet_jax.serve.ratings import Ratings, Vote, check
from duet_jax.serve.telling import people_of, rated
from duet_jax.study import Study

LONGEST_MESSAGE, LONGEST_KEY = 4000, 64
RETRY = 5.0

logger = logging.getLogger(__name__)


class Replies(Protocol):
    """What answers: an `opening.Opener`."""

    @property
    def open(self) -> tuple[int, ...]: ...

    def answer(
        self, number: int, messages: Sequence[dict[str, str]], on_text: Callable[[str, bool], None]
    ) -> Ticket: ...

    def wake(self) -> None: ...


class Chat:
    """The testers' part of the application.

    Args:
      study: whose trials are rated.
      ratings: where they go.
      guard: checks requests.
      replies: what answers.
      kept: file that conversations are written to, for its owner's eyes; None: they are nowhere but in memory.

    Raises:
      StudyError: that file cannot be written.
    """

    def __init__(self, study: Study, ratings: Ratings, guard: Guard, replies: Replies, kept: Path | None) -> None:
        self._study, self._ratings, self._guard, self._replies, self._kept = study, ratings, guard, replies, kept
        self._people, self._keeping = people_of(study.config), threading.Lock()
        try:
            if kept is not None:
                kept.touch(mode=0o600)
        except OSError as error:
            raise StudyError(f"{kept} cannot be written: {error.strerror}.") from None
        self._conversations = Conversations()
        self._random = random.SystemRandom()
        self._messages, self._votes = Rate(0.5, 10), Rate(2.0, 20)

    async def status(self, request: Request) -> Response:
        """How many ratings this tester has given."""
        self._guard.require(request, "tester")
        return JSONResponse({"ratings": await run_in_threadpool(self._count, self._guard.rater(request))})

    async def begin(self, request: Request) -> Response:
        """A new conversation, with the model of one of the open trials: whichever, nobody is told."""
        rater = self._allowed(request, self._messages)
        if not self._replies.open:
            raise Refusal(503, "There is no model to talk to just now; it will go on by itself.", RETRY)
        found = self._conversations.start(self._random.choice(self._replies.open), rater)
        return JSONResponse({"conversation": found.name}, 201)

    async def message(self, request: Request) -> Response:
        """The answer to a message, as lines of JSON while it is written: {"text"}, at last {"answer"} or {"error"}."""
        rater = self._allowed(request, self._messages)
        conversation, sent = self._conversation(request, rater), await body(request)
        text, unknown = sent.get("text"), set(sent) - {"text"}
        if unknown:
            raise Refusal(422, f"A message has a text, and no {ascii(min(unknown))[:60]}.")
        if not isinstance(text, str) or not text.strip() or len(text) > LONGEST_MESSAGE or not _is_text(text):
            raise Refusal(422, f"The field text must be a text of 1 to {LONGEST_MESSAGE} characters.")
        if conversation.writing is not None:
            raise Refusal(409, "The answer before is still being written; wait for its end.")
        events: asyncio.Queue[tuple[str, bool]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        asked = [*conversation.messages, {"role": "user", "content": text}]
        conversation.writing = events

        def arrived(text: str, last: bool) -> None:
            events.put_nowait((text, last))
            # Also where whoever asked has gone before the first line, so that nothing is waiting for the end.
            if last and conversation.writing is events:
                conversation.writing = None

        def put(text: str, last: bool) -> None:
            loop.call_soon_threadsafe(arrived, text, last)

        try:
            ticket = await run_in_threadpool(
                self._replies.answer,
                conversation.trial,
                asked,
                put,
            )
        except BaseException as error:
            if conversation.writing is events:
                conversation.writing = None
            if isinstance(error, Busy):
                raise Refusal(503, "Many people are here just now; please try again in a moment.", RETRY) from None
            if isinstance(error, Closed):
                raise Refusal(410, "This conversation has come to its end; please start a new one.") from None
            raise
        lines = self._answer(conversation, asked, ticket, events)
        return StreamingResponse(lines, media_type="application/x-ndjson")

    async def _answer(
        self,
        conversation: Conversation,
        asked: list[dict[str, str]],
        ticket: Ticket,
        events: asyncio.Queue[tuple[str, bool]],
    ) -> AsyncIterator[str]:
        parts: list[str] = []
        first, last = None, False
        try:
            while not last:
                text, last = await events.get()
                if text:
                    first = first or self._conversations.clock()
                    parts.append(text)
                    yield json.dumps({"text": text}) + "\n"
            if ticket.failed:
                yield json.dumps({"error": "The model has stopped answering; please come back later."}) + "\n"
                return
            whole, name = "".join(parts), str(len(conversation.messages) // 2)
            conversation.messages = [*asked, {"role": "assistant", "content": whole}]
            conversation.answers[name] = (first or self._conversations.clock(), len(whole.split()))
            await self._keep(conversation, name)
            yield json.dumps({"answer": name}) + "\n"
        finally:
            # Whoever has gone needs no more text.
            ticket.cancelled = not last
            if conversation.writing is events:
                conversation.writing = None

    async def rate(self, request: Request) -> Response:
        """A rating of an answer or a conversation. It is on the disk before it is acknowledged."""
        rater = self._allowed(request, self._votes)
        conversation, sent = self._conversation(request, rater), await body(request)
        unknown = set(sent) - {"key", "stars", "answer"}
        if unknown:
            raise Refusal(422, f"A rating may have key, stars and answer, not {ascii(min(unknown))[:60]}.")
        answer, key = sent.get("answer"), sent.get("key")
        if not isinstance(key, str) or not 1 <= len(key) <= LONGEST_KEY:
            raise Refusal(422, f"The field key must be a text of 1 to {LONGEST_KEY} characters.")
        if answer is not None and not isinstance(answer, str):
            raise Refusal(422, "The field answer must be a text.")
        if (answer is not None) != (self._people.per == "answer"):
            raise Refusal(422, f"What is rated is each {self._people.per}.")
        if not conversation.answers or (answer is not None and answer not in conversation.answers):
            raise Refusal(422, "There is no such answer to rate.")
        seen = list(conversation.answers.values()) if answer is None else [conversation.answers[answer]]
        words, began = sum(count for _, count in seen), min(first for first, _ in seen)
        fields = {
            # Two testers may well choose the same key.
            "key": f"{conversation.name}.{key}",
            "trial": conversation.trial,
            "stars": sent.get("stars"),
            "rater": rater,
            "item": conversation.name if answer is None else f"{conversation.name}.{answer}",
            "seconds": round(self._conversations.clock() - began, 2),
            "words": words,
        }
        fresh = await self._add(check(fields, self._people.stars, "page"))
        return JSONResponse({"new": fresh, "ratings": await run_in_threadpool(self._count, rater)})

    async def _add(self, vote: Vote) -> bool:
        try:
            (fresh,) = await run_in_threadpool(self._ratings.add, [vote], self._may_rate)
        except FeedbackError as error:
            raise Refusal(409, str(error)) from None
        self._replies.wake()
        return fresh

    def _may_rate(self, number: int) -> None:
        try:
            rated(self._study, number)
        except FeedbackError:
            # Which trial it is, is nobody's business.
            sentence = "This conversation has come to its end and takes no more ratings. Thank you!"
            raise Refusal(410, sentence) from None

    def _allowed(self, request: Request, rate: Rate) -> str:
        self._guard.require(request, "tester")
        rater = self._guard.rater(request)
        wait = rate.wait(rater)
        if wait:
            raise Refusal(429, "That was a little fast; please try again in a moment.", wait)
        return rater

    def _conversation(self, request: Request, rater: str) -> Conversation:
        found = self._conversations.find(request.path_params["conversation"], rater)
        if found is None:
            raise Refusal(404, "There is no such conversation any more; please start a new one.")
        return found

    def _count(self, rater: str) -> int:
        return sum(vote.rater == rater for vote in self._ratings.all_votes())

    async def _keep(self, conversation: Conversation, answer: str) -> None:
        if self._kept is not None:
            row: dict[str, Any] = {
                "conversation": conversation.name,
                "trial": conversation.trial,
                "rater": conversation.rater,
                "answer": answer,
                "messages": conversation.messages[-2:],
            }
            await run_in_threadpool(self._write, self._kept, row)

    def _write(self, path: Path, row: dict[str, Any]) -> None:
        try:
            with self._keeping:
                append_lines(path, [row])
        except OSError as error:
            # The tester has the answer all the same, and may rate it.
            logger.error("%s cannot be written: %s", path, error.strerror)


def _is_text(text: str) -> bool:
    """Whether a tokenizer can read it: JSON can spell lone surrogates, which are no characters."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
