"""A real HTTP server that continues a prompt as the built-in model does, by what it has read."""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from hip_sglang.demo.vocabulary import Tokenizer

_GRAM = 7


def continued(ids: list[int], tokens: int) -> list[int]:
    """What follows the first place where the last seven tokens stand; it ends where there is none.

    This is what the built-in model computes, were its attention perfect.
    """
    known = list(ids)
    while len(known) < len(ids) + tokens:
        last = known[-_GRAM:]
        for end in range(_GRAM, len(known)):
            if known[end - _GRAM : end] == last:
                known.append(known[end])
                break
        else:
            break
    return known[len(ids) :]


class CopyingServer:
    """``/generate`` in threads; keeps what it was asked."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.asked: list[tuple[int, ...]] = []
        self.silent_from: int | None = None  # answers nothing from this request on
        self.refuses = False
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, answer = owner.answer(body)
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                # who asked may have been killed meanwhile
                with suppress(ConnectionError):
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                """A test's output is its own."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        ids = body["input_ids"]
        with self._lock:
            self.asked.append(tuple(ids))
            number = len(self.asked)
        if self.refuses:
            return 400, {"error": "no"}
        assert body["sampling_params"]["temperature"] == 0
        silent = self.silent_from is not None and number >= self.silent_from
        said = [] if silent else continued(ids, body["sampling_params"]["max_new_tokens"])
        return 200, {"text": self._tokenizer.decode(said)}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
