"""A server that was told to end takes no new requests, so that those that it has can end.

SGLang 0.5.21 says 503 on ``/health`` then, and answers everything else as before: under load it
would never be done.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

RETRY_AFTER_SECONDS = 5
REFUSAL = {
    "object": "error",
    "message": "this server is shutting down and takes no new requests; send it again",
    "type": "503",
    "code": 503,
}
# what brings requests to their end is welcome, and so is everything that only reads
WELCOME = ("/abort_request", "/continue_generation", "/close_session")
READING = ("GET", "HEAD", "OPTIONS")


def set_server_stop_hook(original: Callable[..., None], manager: Any, hook: Any) -> None:
    """Around ``TokenizerManager.set_server_stop_hook``, SGLang's last step before it listens."""
    from sglang.srt.entrypoints.http_server import app

    original(manager, hook)
    app.add_middleware(RefuseWhileDraining, is_draining=lambda: manager.gracefully_exit)


class RefuseWhileDraining:
    """ASGI middleware: 503 with ``Retry-After`` for new requests once ``is_draining()``."""

    def __init__(self, app: Any, is_draining: Callable[[], bool]) -> None:
        self._app, self._is_draining = app, is_draining

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if not self._is_draining() or not _is_new(scope):
            await self._app(scope, receive, send)
            return
        # whoever is still sending a long prompt would not read an answer
        while (await receive()).get("more_body", False):
            pass
        body = json.dumps(REFUSAL).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "retry-after": str(RETRY_AFTER_SECONDS),
            # the next attempt is to find another server
            "connection": "close",
        }
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 503, "headers": pairs})
        await send({"type": "http.response.body", "body": body})


def _is_new(scope: Message) -> bool:
    if scope["type"] != "http" or scope["method"] in READING:
        return False
    path: str = scope["path"]
    return not (path.startswith(WELCOME) or path.endswith("/cancel"))
