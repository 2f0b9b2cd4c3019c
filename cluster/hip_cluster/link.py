"""The wire between a rank and the supervisor: one TCP connection, JSON lines.

Its end tells either side that the other one died, a second after it did. On it a rank says twice a
second how many steps it made; the supervisor says the endpoint's key, once, and when to drain.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

REPORT_SECONDS = 0.5
CONNECT_SECONDS = 10.0
# a machine that lost its power says nothing; the kernel asks it every second
KEEPALIVE = ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 3))

Role = Literal["engine", "rank"]


@dataclass(frozen=True)
class Member:
    """One process of one attempt to run a replica; ``secret`` is how it proves that."""

    endpoint: str
    replica: int
    attempt: int
    role: Role
    rank: int
    secret: str

    @property
    def name(self) -> str:
        return "engine" if self.role == "engine" else f"rank {self.rank}"

    @property
    def title(self) -> str:
        """What it is called in the log of the whole endpoint."""
        return f"replica {self.replica} {self.name}"


@dataclass(frozen=True)
class Progress:
    """What a scheduler did so far, and whether there is work for it."""

    steps: int = 0
    busy: bool = False


class Link:
    """A process's end of the wire. Where the supervisor's end closes, the process ends."""

    def __init__(
        self,
        address: tuple[str, int],
        member: Member,
        progress: Callable[[], Progress] = Progress,
        on_lost: Callable[[], None] = lambda: os._exit(1),
    ) -> None:
        """Connect and say who this is. Raises OSError where nobody listens."""
        self._socket = socket.create_connection(address, CONNECT_SECONDS)
        self._socket.settimeout(None)
        set_keepalive(self._socket)
        self._reader = self._socket.makefile("rb")
        self._sending = threading.Lock()
        self._progress = progress
        self._on_lost = on_lost
        self.draining = False  # the supervisor said that no new clients are wanted
        hello = {"kind": "hello", "pid": os.getpid(), "node": socket.gethostname()}
        self.send(**hello, **member.__dict__)
        self.welcome: Mapping[str, Any] = json.loads(self._reader.readline() or b"{}")
        if self.welcome.get("kind") != "welcome":
            raise ConnectionError(
                f"the supervisor at {address[0]}:{address[1]} refused {member.name}"
            )

    def start(self, progress: Callable[[], Progress] | None = None) -> None:
        """Report from now on, and watch for the other end to close."""
        if progress is not None:
            self._progress = progress
        for name, work in (("link-report", self._report), ("link-watch", self._watch)):
            threading.Thread(target=work, name=name, daemon=True).start()

    def watch_progress(self, progress: Callable[[], Progress]) -> None:
        """Report this from now on."""
        self._progress = progress

    def send(self, **message: Any) -> None:
        """Send one message; a closed wire is noticed by who watches it."""
        with self._sending:
            try:
                self._socket.sendall(json.dumps(message).encode() + b"\n")
            except OSError:
                return

    def _report(self) -> None:
        wait = threading.Event()
        while not wait.wait(REPORT_SECONDS):
            now = self._progress()
            self.send(kind="report", steps=now.steps, busy=now.busy)

    def _watch(self) -> None:
        try:
            while line := self._reader.readline():
                self.draining = json.loads(line)["kind"] == "drain"
        except (OSError, ValueError):
            pass
        print(
            "hip-cluster: the supervisor is gone, or ended this attempt; ending",
            file=sys.stderr,
            flush=True,
        )
        self._on_lost()


def set_keepalive(connection: socket.socket) -> None:
    """Notice within four seconds that the other machine is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
