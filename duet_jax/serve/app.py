"""The application: pages, their files, and the endpoints behind them."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

import jinja2
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from duet_jax.errors import DuetError, FeedbackError
from duet_jax.serve.chat import LONGEST_MESSAGE, Chat, Replies
from duet_jax.serve.guard import Guard, Refusal, SafeHeaders, refuse
from duet_jax.serve.limits import Rate, SizeLimit, TooLarge
from duet_jax.serve.openapi import describe
from duet_jax.serve.owner import Owner
from duet_jax.serve.ratings import Ratings
from duet_jax.serve.telling import people_of
from duet_jax.serve.tokens import Tokens
from duet_jax.study import Study

LARGEST_BODY = 64 * 1024
KINDS = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
FILES = ("chat.js", "owner.js", "page.css", "icon.svg")


def build(study: Study, ratings: Ratings, replies: Replies, *, keep_conversations: bool = False) -> ASGIApp:
    """The ASGI application of a study.

    Args:
      study: whose task is of kind "people".
      ratings: of the study.
      replies: what answers testers.
      keep_conversations: whether conversations are written to conversations.jsonl in the study; the page says so.

    Raises:
      FeedbackError: people do not rate this study.
      StudyError: its secret cannot be read or written.
    """
    people, tokens = people_of(study.config), Tokens(study.folder)
    guard = Guard(tokens)
    kept: Path | None = study.folder / "conversations.jsonl" if keep_conversations else None
    chat = Chat(study, ratings, guard, replies, kept)
    owner = Owner(study, ratings, tokens, guard, replies)
    pages = _Pages(guard, {"people": people, "keeps": keep_conversations, "longest": LONGEST_MESSAGE})
    description = describe(people.stars)

    async def openapi(request: Request) -> Response:
        return JSONResponse(description)

    routes = [
        Route("/", pages.chat),
        Route("/owner", pages.owner),
        Route("/static/{name}", pages.file),
        Route("/openapi.json", openapi),
        Route("/api/status", chat.status),
        Route("/api/conversations", chat.begin, methods=["POST"]),
        Route("/api/conversations/{conversation}/messages", chat.message, methods=["POST"]),
        Route("/api/conversations/{conversation}/ratings", chat.rate, methods=["POST"]),
        Route("/api/ratings", owner.report_rating, methods=["POST"]),
        Route("/api/owner/summary", owner.summary),
        Route("/api/owner/tell", owner.tell, methods=["POST"]),
        Route("/api/owner/raters", owner.exclude, methods=["POST"]),
        Route("/owner/report", owner.report),
    ]
    handlers: dict[Any, Any] = {
        Refusal: _refused,
        TooLarge: _too_large,
        FeedbackError: _mistaken,
        DuetError: _broken,
    }
    return SafeHeaders(SizeLimit(Starlette(routes=routes, exception_handlers=handlers), LARGEST_BODY))


class _Pages:
    """The two pages and their files, read once."""

    def __init__(self, guard: Guard, values: dict[str, Any]) -> None:
        folder = importlib.resources.files("duet_jax.serve")
        self._files = {name: folder.joinpath(name).read_bytes() for name in FILES}
        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        self._pages = {
            name: environment.from_string(folder.joinpath(f"{name}.html").read_text(encoding="utf-8")).render(**values)
            for name in ("chat", "owner", "refused")
        }
        self._guard = guard
        self._visits = Rate(1.0, 200)

    async def chat(self, request: Request) -> Response:
        return self._page(request, "tester", "chat")

    async def owner(self, request: Request) -> Response:
        return self._page(request, "owner", "owner")

    async def file(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._files:
            raise Refusal(404, "There is no such file.")
        return Response(self._files[name], media_type=KINDS[Path(name).suffix])

    def _page(self, request: Request, role: str, name: str) -> Response:
        wait = self._visits.wait("" if request.client is None else request.client.host)
        if wait:
            raise Refusal(429, "Too many visits from one address; try again in a moment.", wait)
        try:
            moved = self._guard.enter(request, role)
            if moved is not None:
                return moved
            self._guard.require(request, role)
        except Refusal as refusal:
            return HTMLResponse(self._pages["refused"], refusal.status)
        response = HTMLResponse(self._pages[name])
        if role == "tester":
            self._guard.name(request, response)
        return response


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return refuse(error)


async def _too_large(request: Request, error: Exception) -> Response:
    return refuse(Refusal(413, f"The body is larger than {LARGEST_BODY // 1024} KiB."))


async def _mistaken(request: Request, error: Exception) -> Response:
    return refuse(Refusal(422, str(error)))


async def _broken(request: Request, error: Exception) -> Response:
    # The sentence names files of the study, which are nobody's business but the owner's.
    return refuse(Refusal(503, "The server cannot write its files just now; please try again.", 30.0))
