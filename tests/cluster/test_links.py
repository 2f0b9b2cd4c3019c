"""The wire between a process and the supervisor: real sockets, real processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from hip_cluster.keys import read_key
from hip_cluster.link import Member, Progress
from hip_cluster.links import LinkServer, Wire

from hip_sglang.secret import Secret

RANK = """
import sys, time
from hip_cluster.link import Link, Member, Progress
port, secret, role = int(sys.argv[1]), sys.argv[2], sys.argv[3]
began = time.monotonic()
link = Link(("127.0.0.1", port), Member("e", 0, 1, role, 0, secret))
print(link.welcome, flush=True)
link.start(lambda: Progress(int(10 * (time.monotonic() - began)), True))
time.sleep(60)
"""


class Listener:
    """A link server, and all that it heard."""

    def __init__(self, key=None):
        self.heard = []
        self.server = LinkServer(lambda member, said: self.heard.append(said["kind"]), key)

    async def __aenter__(self):
        self.port = await self.server.start("127.0.0.1", 0)
        return self

    async def __aexit__(self, *error):
        await self.server.stop()

    def rank(self, secret=None, role="rank"):
        line = [sys.executable, "-c", RANK, str(self.port), secret or self.server.secret, role]
        return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    async def until(self, condition, seconds=30):
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        assert condition()


def test_a_process_that_dies_is_told_at_once():
    async def run():
        async with Listener() as listener:
            process = listener.rank()
            await listener.until(lambda: "joined" in listener.heard)
            process.kill()
            process.wait()
            await listener.until(lambda: "left" in listener.heard, seconds=2)
            assert not listener.server.wires

    asyncio.run(run())


def test_a_process_whose_supervisor_is_gone_ends():
    async def run():
        async with Listener() as listener:
            process = listener.rank()
            await listener.until(lambda: "joined" in listener.heard)
        await asyncio.to_thread(process.wait, 10)
        assert process.returncode == 1
        assert "the supervisor is gone" in process.stderr.read()

    asyncio.run(run())


def test_one_attempt_is_dismissed_and_leaves():
    async def run():
        async with Listener() as listener:
            process = listener.rank()
            await listener.until(lambda: "joined" in listener.heard)
            listener.server.dismiss(0, 2)
            await asyncio.sleep(1)
            assert process.poll() is None
            listener.server.dismiss(0, 1)
            await listener.until(lambda: "left" in listener.heard, seconds=5)

    asyncio.run(run())


def test_a_stranger_is_refused():
    async def run():
        async with Listener() as listener:
            process = listener.rank(secret="guessed")
            await asyncio.to_thread(process.wait, 30)
            assert process.returncode == 1
            assert "refused rank 0" in process.stderr.read()
            assert listener.heard == []

    asyncio.run(run())


def test_only_the_engine_is_told_the_key():
    async def run():
        async with Listener(Secret("s3cret")) as listener:
            for role, key in (("rank", None), ("engine", "s3cret")):
                process = listener.rank(role=role)
                line = await asyncio.to_thread(process.stdout.readline)
                assert json.loads(line.replace("'", '"').replace("None", "null"))["api_key"] == key
                process.kill()
                process.wait()

    asyncio.run(run())


@pytest.mark.slow
def test_a_stopped_process_is_not_heard_of_any_more_and_its_wire_stays():
    async def run():
        async with Listener() as listener:
            process = listener.rank()
            await listener.until(lambda: "joined" in listener.heard)
            (wire,) = listener.server.wires.values()
            await listener.until(lambda: wire.progress.steps > 0)
            os.kill(process.pid, signal.SIGSTOP)
            await asyncio.sleep(0.6)
            heard = wire.heard
            await asyncio.sleep(1.5)
            assert wire.heard == heard
            assert "left" not in listener.heard
            process.kill()
            process.wait()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("reports", "moved"),
    [
        # work and steps
        ([(1.0, 1, True), (2.0, 2, True)], 2.0),
        # work and no step: the clock stands
        ([(1.0, 1, True), (2.0, 1, True), (9.0, 1, True)], 1.0),
        # nothing to do is no hang, however long
        ([(1.0, 1, False), (9.0, 1, False)], 9.0),
        # and the clock starts with the work
        ([(1.0, 1, False), (9.0, 1, True), (10.0, 1, True)], 9.0),
    ],
)
def test_a_rank_hangs_when_there_is_work_and_no_step(reports, moved):
    wire = Wire(Member("e", 0, 1, "rank", 0, "s"), 1, "here", heard=0.0, moved=0.0)
    for now, steps, busy in reports:
        wire.hear(Progress(steps, busy), now)
    assert wire.moved == moved


def test_a_key_does_not_show_itself(tmp_path, monkeypatch):
    (tmp_path / "key").write_text("s3cret\n")
    key = read_key(str(tmp_path / "key"), None)
    assert key == "s3cret"
    assert "s3cret" not in f"{ {'api_key': key} }"
    monkeypatch.setenv("KEY", "other")
    assert read_key(None, "KEY") == "other"
    for wrong in ((str(tmp_path / "none"), None), (None, "NO_SUCH_VARIABLE")):
        with pytest.raises(ValueError, match=r"^auth\.api_key_"):
            read_key(*wrong)
