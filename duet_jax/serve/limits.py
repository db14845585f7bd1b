"""What keeps one visitor from taking the server from the others: rates, and sizes of what is sent."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_VISITORS = 10_000


class Rate:
    """A token bucket for each visitor: `burst` at once, `per_second` after that.

    The least recent of more than `MOST_VISITORS` is forgotten.
    """

    def __init__(self, per_second: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second, self._burst, self._clock = per_second, burst, clock
        self._buckets: collections.OrderedDict[str, tuple[float, float]] = collections.OrderedDict()

    def wait(self, visitor: str) -> float:
        """Seconds until the visitor may come again; 0 lets it in and counts it."""
        now = self._clock()
        left, then = self._buckets.pop(visitor, (float(self._burst), now))
        left = min(left + (now - then) * self._per_second, float(self._burst))
        allowed = left >= 1
        self._buckets[visitor] = (left - allowed, now)
        if len(self._buckets) > MOST_VISITORS:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1 - left) / self._per_second


class TooLarge(Exception):
    """A body is longer than is read."""


class SizeLimit:
    """ASGI middleware that stops reading a body after `most` bytes, whatever its header promised."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most:
                raise TooLarge
            return message

        await self._app(scope, limited if scope["type"] == "http" else receive, send)
