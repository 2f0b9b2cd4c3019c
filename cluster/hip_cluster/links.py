"""The supervisor's end of every wire: who is there, what they did, and who died."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hip_cluster.link import Member, Progress, set_keepalive
from hip_sglang.secret import Secret

HELLO_SECONDS = 10.0


@dataclass
class Wire:
    """One connected process, and when it was last heard of (in seconds of a steady clock)."""

    member: Member
    pid: int
    node: str
    heard: float
    moved: float  # when its step counter changed, or there was nothing to do
    progress: Progress = field(default_factory=Progress)

    def hear(self, progress: Progress, now: float) -> None:
        """Take in a report."""
        if progress.steps != self.progress.steps or not progress.busy:
            self.moved = now
        elif not self.progress.busy:
            # the clock starts with the work
            self.moved = now
        self.heard, self.progress = now, progress


Handler = Callable[[Member, Mapping[str, Any]], None]


class LinkServer:
    """Accepts the wires of every replica's processes; calls back on the event loop.

    ``on_message`` gets what they say, and ``{"kind": "left"}`` when a wire ends.
    """

    def __init__(self, on_message: Handler, api_key: Secret | None = None) -> None:
        self.secret = secrets.token_hex(16)
        self.wires: dict[Member, Wire] = {}
        self._on_message = on_message
        self._api_key = api_key
        self._writers: dict[Member, asyncio.StreamWriter] = {}
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port. Raises OSError where it is taken."""
        self._server = await asyncio.start_server(self._accept, host, port)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Close everything: whoever was connected ends."""
        if self._server is not None:
            self._server.close()
        for writer in self._writers.values():
            writer.close()

    def members(self, replica: int, attempt: int) -> list[Member]:
        """Who of one attempt is connected."""
        return [m for m in self.wires if (m.replica, m.attempt) == (replica, attempt)]

    def dismiss(self, replica: int, attempt: int) -> None:
        """Tell everybody of one attempt to end; each leaves when it did."""
        for member in self.members(replica, attempt):
            writer = self._writers[member]
            if writer.can_write_eof():
                writer.write_eof()

    def tell(self, replica: int, attempt: int, message: Mapping[str, Any]) -> None:
        """Say something to the engine of one attempt."""
        for member in self.members(replica, attempt):
            if member.role == "engine":
                self._writers[member].write(json.dumps(message).encode() + b"\n")

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        member = await self._greet(reader, writer)
        if member is None:
            writer.close()
            return
        try:
            while line := await reader.readline():
                message = json.loads(line)
                if message["kind"] == "report":
                    progress = Progress(steps=message["steps"], busy=message["busy"])
                    self.wires[member].hear(progress, time.monotonic())
                else:
                    self._on_message(member, message)
        except (OSError, ValueError):
            pass
        finally:
            writer.close()
            self.wires.pop(member, None)
            self._writers.pop(member, None)
            self._on_message(member, {"kind": "left"})

    async def _greet(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Member | None:
        """Who this is, or None for a stranger."""
        try:
            hello = json.loads(await asyncio.wait_for(reader.readline(), HELLO_SECONDS))
            member = Member(**{name: hello[name] for name in Member.__dataclass_fields__})
            pid, node = int(hello["pid"]), str(hello["node"])
        except (OSError, ValueError, KeyError, TypeError, TimeoutError):
            return None
        if not secrets.compare_digest(member.secret.encode(), self.secret.encode()):
            return None
        set_keepalive(writer.get_extra_info("socket"))
        now = time.monotonic()
        self.wires[member] = Wire(member, pid, node, heard=now, moved=now)
        self._writers[member] = writer
        welcome = {"kind": "welcome", "api_key": self._api_key if member.role == "engine" else None}
        writer.write(json.dumps(welcome).encode() + b"\n")
        self._on_message(member, {"kind": "joined"})
        return member
