"""What stands before SGLang's HTTP server in its own process.

A draining server says so at ``/health`` and goes on to answer: routers need time to notice, and
SGLang's own draining ends a server that is idle, whoever may still be on the way to it. And before
a scrape, what ranks of other machines count is fetched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

HEALTH = {"/health", "/health_generate"}
UNHEALTHY = {
    "type": "http.response.start",
    "status": 503,
    "headers": [(b"retry-after", b"5"), (b"content-length", b"0")],
}

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class Door:
    """An ASGI middleware. ``is_draining`` is asked at each probe, ``refresh`` done at a scrape.

    ``running`` holds what was posted and is not answered to its end: a long prompt is in no rank's
    hands before it is tokens.
    """

    def __init__(
        self,
        app: Any,
        is_draining: Callable[[], bool],
        refresh: Callable[[], None],
        running: set[int],
    ) -> None:
        self._app, self._is_draining, self._refresh = app, is_draining, refresh
        self._running = running

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if path in HEALTH and self._is_draining():
            await send(UNHEALTHY)
            await send({"type": "http.response.body", "body": b""})
            return
        if path.startswith("/metrics"):
            await asyncio.to_thread(self._refresh)
        if scope.get("method") != "POST":
            await self._app(scope, receive, send)
            return
        self._running.add(id(scope))
        try:
            await self._app(scope, receive, send)
        finally:
            self._running.discard(id(scope))
