"""One real SGLang server in a process group of its own, ended on every way out."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import httpx

_BOOT_SECONDS = 600.0
_STOP_SECONDS = 10.0


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    url: str
    boot_s: float


@contextmanager
def serve(
    arguments: Sequence[str], log: Path, environment: Mapping[str, str] = os.environ
) -> Iterator[Server]:
    """Run ``python -m sglang.launch_server`` with these arguments on a free port of this machine.

    Its output goes to ``log``, and it inherits ``environment``. However the block is left, all of
    the server's processes are gone afterwards. Raises ChildProcessError where it ends, or is not
    ready in ten minutes.
    """
    port = _free_port()
    command = [sys.executable, "-m", "sglang.launch_server", "--host", "127.0.0.1"]
    command += ["--port", str(port), *arguments]
    # nothing here is downloaded, and nobody should wait for an attempt
    environment = {**environment, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        began = time.monotonic()
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(process, url, log)
        yield Server(url, time.monotonic() - began)
    finally:
        _end(process)


@contextmanager
def unwind_on_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP unwind as Ctrl-C does, so that no server is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def unwind(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    previous = {signum: signal.signal(signum, unwind) for signum in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _BOOT_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ChildProcessError(
                f"the server ended with code {process.returncode} before it was ready: "
                f"{_reason(log)} (all of it in {log})"
            )
        try:
            if httpx.get(f"{url}/health", timeout=10).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise ChildProcessError(f"the server was not ready after {_BOOT_SECONDS:.0f} s; see {log}")


def _reason(log: Path) -> str:
    """The first line that names an error, else the last line: one process takes others along."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [
        line for line in lines if re.match(r"(\S+: )?[\w.]*(Error|Exception|error)\b.*:", line)
    ]
    return [*errors[:1], *lines[-1:], "it wrote nothing"][0]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, then insist: also where the asking is interrupted."""
    try:
        # asked together with it, its ranks would look as if they crashed
        process.terminate()
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        # a rank may outlive the process that started it
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
