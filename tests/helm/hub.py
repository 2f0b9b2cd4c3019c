"""Enough of the Hugging Face hub, on this machine, for its own client to download a model."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "a" * 40


@contextmanager
def hub(files: Mapping[str, bytes], says: Mapping[str, bytes]) -> Iterator[str]:
    """A hub that has one commit of one repository; its checksums are those of ``says``."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            path = self.path.split("?")[0]
            headers = {}
            if path.startswith("/api/models/owner/model/tree/"):
                body = json.dumps([entry(name, says[name]) for name in files]).encode()
            elif path.startswith("/api/models/owner/model"):
                siblings = [sibling(name, says[name]) for name in files]
                body = json.dumps({"id": "owner/model", "sha": COMMIT, "siblings": siblings})
                body = body.encode()
            elif (name := path.rsplit("/", 1)[1]) in files:
                body = files[name]
                headers = {"ETag": f'"{digest(says[name])}"', "X-Repo-Commit": COMMIT}
            else:
                self.send_error(404)
                return
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def blob(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def entry(name: str, content: bytes) -> dict[str, Any]:
    """A file in the answer to a listing."""
    found: dict[str, Any] = {"type": "file", "path": name, "size": len(content)}
    found["oid"] = blob(content)
    if name.endswith(".safetensors"):
        found["lfs"] = {"oid": digest(content), "size": len(content), "pointerSize": 130}
    return found


def sibling(name: str, content: bytes) -> dict[str, Any]:
    """A file in the description of the repository."""
    found: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob(content)}
    if name.endswith(".safetensors"):
        found["lfs"] = {"sha256": digest(content), "size": len(content), "pointerSize": 130}
    return found
