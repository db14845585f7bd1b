"""Who may do what: tokens, cookies, origins and bodies of requests. Whatever is refused is refused in one sentence."""

from __future__ import annotations

import json
import math
import secrets
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from duet_jax.serve.tokens import Tokens, same

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
COOKIE_SECONDS = 90 * 24 * 3600


class Refusal(Exception):
    """A request that is not answered, with its status, the sentence that says why, and when to try again (seconds)."""

    def __init__(self, status: int, sentence: str, retry_after: float | None = None) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.retry_after = status, sentence, retry_after


def refuse(refusal: Refusal) -> Response:
    """The answer to a refused request."""
    headers = {} if refusal.retry_after is None else {"retry-after": str(math.ceil(refusal.retry_after))}
    return JSONResponse({"error": refusal.sentence}, refusal.status, headers)


class Guard:
    """Checks requests against the tokens of a study."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        # Cookies know no ports: of two studies that are served on one host, each has its own names.
        self._suffix = tokens.rater("cookies")

    def enter(self, request: Request, role: str) -> Response | None:
        """Takes the token from a link: puts it into a cookie and leads to the address without it."""
        given = request.query_params.get("token")
        if given is None:
            return None
        if not same(given, getattr(self._tokens, role)):
            raise Refusal(403, f"The token in this link is not the {role}'s of this study; ask for a new link.")
        response = RedirectResponse(request.url.path, 303)
        self._keep(request, response, role, given)
        return response

    def require(self, request: Request, role: str) -> None:
        """Refuses whoever has not come by a link with the token of the role, "tester" or "owner"."""
        given = request.cookies.get(f"duet_{role}_{self._suffix}", "")
        if not same(given, getattr(self._tokens, role)):
            raise Refusal(403, f"This needs the {role}'s link of this study, which duet serve prints when it starts.")
        if request.method != "GET":
            self._require_origin(request, needed=True)

    def require_trial(self, request: Request, number: int) -> None:
        """Refuses programs without the token of the trial, `Authorization: Bearer TOKEN`."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not same(given.strip(), self._tokens.trial(number)):
            raise Refusal(401, "This needs the header Authorization: Bearer TOKEN with the token of the trial.")
        self._require_origin(request, needed=False)

    def rater(self, request: Request) -> str:
        """The pseudonym of whoever has opened the page."""
        cookie = self._known(request)
        if cookie is None:
            raise Refusal(403, "This browser has no rater's cookie; open the page first.")
        return self._tokens.rater(cookie)

    def name(self, request: Request, response: Response) -> None:
        """Gives a browser that has none the cookie of a new rater."""
        if self._known(request) is None:
            value = secrets.token_hex(16)
            self._keep(request, response, "rater", f"{value}.{self._tokens.proof(value)}")

    def _known(self, request: Request) -> str | None:
        """The value of a rater's cookie, None unless it was given here."""
        value, _, proof = request.cookies.get(f"duet_rater_{self._suffix}", "").partition(".")
        return value if same(proof, self._tokens.proof(value)) else None

    def _keep(self, request: Request, response: Response, name: str, value: str) -> None:
        response.set_cookie(
            f"duet_{name}_{self._suffix}",
            value,
            max_age=COOKIE_SECONDS,
            httponly=True,
            samesite="lax",
            secure=request.url.scheme == "https",
        )

    @staticmethod
    def _require_origin(request: Request, *, needed: bool) -> None:
        site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
        if site is None and origin is None and not needed:
            return
        ours = origin is None or urlsplit(origin).netloc == request.headers.get("host")
        if site not in (None, "same-origin") or not ours or (site is None and origin is None):
            raise Refusal(403, "This request does not come from the page of this server.")


async def body(request: Request) -> dict[str, Any]:
    """The JSON object that a request carries."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, "The body must be JSON, with the header Content-Type: application/json.")
    try:
        found = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise Refusal(400, "The body is not valid JSON.") from None
    if not isinstance(found, dict):
        raise Refusal(400, "The body must be a JSON object.")
    return found


class SafeHeaders:
    """ASGI middleware: every answer carries `HEADERS`, and the content security policy unless it brings its own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name for name, _ in message["headers"]}
                wanted = {**HEADERS, "content-security-policy": POLICY}
                extra = [(k.encode(), v.encode()) for k, v in wanted.items() if k.encode() not in present]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        await self._app(scope, receive, marked if scope["type"] == "http" else send)
