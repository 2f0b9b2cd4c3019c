"""A real SGLang server for the tests that need one: ``serve(*args, model=...)`` -> ``Server``."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.tiny_llama import write_tiny_llama

BOOT_SECONDS = 300


@dataclass(frozen=True)
class Server:
    """A running server: where it listens, what it logs, and its process."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def generate(self, input_ids: Sequence[int], max_new_tokens: int = 16) -> dict[str, Any]:
        """Greedy tokens for one prompt, as SGLang's ``/generate`` answers."""
        sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        body = {"input_ids": list(input_ids), "sampling_params": sampling}
        answer = httpx.post(f"{self.url}/generate", json=body, timeout=300).raise_for_status()
        result: dict[str, Any] = answer.json()
        return result

    def is_healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        """End the server and every process that it started."""
        # SGLang takes a request to stop, sent to all of them, for a crash, and looks into it
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=60)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


class Serve:
    """Boot ``python -m sglang.launch_server`` with hip_attention and the arguments given.

    One server runs at a time. Asking again with the same arguments gives the running one; other
    arguments stop it first. So a file of tests shares a server when its tests ask alike.
    """

    def __init__(self, default_model: Path, logs: Callable[[], Path]) -> None:
        self._default_model = default_model
        self._logs = logs
        self._running: tuple[tuple[str, ...], Server] | None = None

    def __call__(self, *args: str, model: Path | None = None) -> Server:
        wanted = (str(model or self._default_model), *args)
        if self._running is not None:
            asked, server = self._running
            if asked == wanted and server.process.poll() is None:
                return server
        self.stop()
        self._running = wanted, _boot(*wanted, log=self._logs())
        return self._running[1]

    def stop(self) -> None:
        """Stop the running server, for a test that needs the machine to itself."""
        if self._running is not None:
            self._running[1].stop()
            self._running = None


@pytest.fixture(scope="session")
def serve(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    servers = Serve(tiny_llama, lambda: tmp_path_factory.mktemp("server") / "log.txt")
    yield servers
    servers.stop()


def _boot(model: str, *args: str, log: Path) -> Server:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # an idle scheduler would keep a core busy
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model]
    command += ["--sleep-on-idle"]
    if "--attention-backend" not in args:
        command += ["--attention-backend", "hip_attention"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), *args],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", log, process)
    deadline = time.monotonic() + BOOT_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if server.is_healthy():
            return server
        time.sleep(0.5)
    server.stop()
    pytest.fail(f"the server did not start; the end of its log:\n{log.read_text()[-4000:]}")
