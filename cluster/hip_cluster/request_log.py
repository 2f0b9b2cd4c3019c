"""What becomes of each request, in the server's log and in every rank's: a line when it comes, and
one when it ends, with its id.

The id is the client's ``X-Request-Id``, which the router passes on; without one, SGLang's own.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Mapping
from typing import Any

log = logging.getLogger("hip_cluster.request")
# of what sglang says about an answer
KEPT = ("prompt_tokens", "cached_tokens", "completion_tokens", "e2e_latency")
# sglang takes two requests of one id for one another, and a client chooses the router's: so each
# gets an ending of our own. sglang numbers the prompts of a request that has several
OURS = re.compile(r"(.+)\.[0-9a-f]{8}(?:_\d+)?")


def carry_request_ids(tokenizer_manager: Any) -> None:
    """Let SGLang call a request by the router's id for it, in its log and in ``meta_info``."""
    generate = tokenizer_manager.generate_request

    def generate_request(obj: Any, request: Any = None) -> Any:
        given = request.headers.get("x-request-id") if request is not None else None
        if given and obj.rid is None:
            obj.rid = f"{given}.{uuid.uuid4().hex[:8]}"
        return generate(obj, request)

    tokenizer_manager.generate_request = generate_request


def tell(message: str, rid: str, **more: Any) -> None:
    """Log one line about a request."""
    ours = OURS.fullmatch(rid)
    fields = {"request_id": ours[1] if ours else rid, "rid": rid, **more}
    log.info(message, extra={"fields": fields})


class RequestLog:
    """SGLang's request logger, which goes on as it was told, with our two lines."""

    def __init__(self, sglang: Any) -> None:
        self._sglang = sglang

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sglang, name)

    def log_received_request(self, obj: Any, tokenizer: Any = None, request: Any = None) -> None:
        """A request came; one of several prompts has several ids."""
        for rid in [obj.rid] if isinstance(obj.rid, str) else obj.rid:
            tell("request received", rid)
        self._sglang.log_received_request(obj, tokenizer, request)

    def log_finished_request(self, obj: Any, out: Mapping[str, Any], request: Any = None) -> None:
        """Its last token is on its way to the client."""
        meta = out["meta_info"]
        tell("request answered", obj.rid, **{name: meta[name] for name in KEPT if name in meta})
        self._sglang.log_finished_request(obj, out, request=request)


def logged(scheduler: Any) -> type:
    """SGLang's scheduler, which says of each request that it began and that it ended."""

    class Logged(scheduler):  # type: ignore[misc]
        def handle_generate_request(self, recv_req: Any, **more: Any) -> None:
            tell("request queued", recv_req.rid, prompt_tokens=len(recv_req.input_ids or ()))
            super().handle_generate_request(recv_req, **more)

        def get_output_streamer_class(self) -> type:
            return _with_ends(super().get_output_streamer_class())

    return Logged


def _with_ends(streamer: Any) -> type:
    class WithEnds(streamer):  # type: ignore[misc]
        __slots__ = ()

        def stream_output(self, reqs: Any, *more: Any, **named: Any) -> None:
            for req in reqs:
                # with overlapped scheduling a request that ended comes twice
                if req.finished() and not req.finished_output:
                    tell(
                        "request ended",
                        req.rid,
                        completion_tokens=len(req.output_ids),
                        cached_tokens=req.cached_tokens,
                        finish=req.finished_reason.to_json()["type"],
                    )
            super().stream_output(reqs, *more, **named)

    return WithEnds
