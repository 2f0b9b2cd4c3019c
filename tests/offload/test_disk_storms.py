"""Prefixes on disk under traffic, over ranks, and where the disk is not what it should be."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import zmq
from sglang.srt.disaggregation.kv_events import BlockStored, KVEventBatch

from hip_sglang.cli import run
from tests.offload.test_prefixes_on_disk import LENGTHS, Answers, cached, fresh, pages
from tests.offload.test_server import HIP, OFFLOAD
from tests.server.test_batches import TOLERANCE, ask, come_and_go, prompt
from tests.server.test_hostile import flush
from tests.servers import Serve, Server

pytestmark = [pytest.mark.server, pytest.mark.soak]

SOME = LENGTHS[:4]


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def start(serve: Serve, disk: Path, port: int) -> Callable[..., Server]:
    def started(*more: str, path: Path = disk, **hip: Any) -> Server:
        config = {**HIP, **hip, "offload": {**OFFLOAD, "disk": {"path": str(path), "gib": 1}}}
        events = {"publisher": "zmq", "endpoint": f"tcp://*:{port}", "topic": "kv"}
        arguments = "--enable-metrics", "--kv-events-config", json.dumps(events)
        return serve("--hip-config", json.dumps(config), *arguments, *more)

    return started


@pytest.fixture(scope="module")
def cold(start: Callable[..., Server]) -> Answers:
    server = start()
    return {length: ask(server, fresh(length)) for length in SOME}


def test_what_comes_back_is_announced_to_routers(
    start: Callable[..., Server], cold: Answers, port: int
) -> None:
    server, length = start(), 1345
    with zmq.Context() as context, context.socket(zmq.SUB) as events:
        events.subscribe(b"kv")
        events.connect(f"tcp://127.0.0.1:{port}")
        time.sleep(1)
        flush(server)
        ask(server, fresh(length))
        stored = stored_tokens(events)
    whole = (length - 1) // 64 * 64
    assert stored[:whole] == fresh(length)[:whole]
    assert cached(server, length) == whole


def stored_tokens(events: zmq.Socket[bytes]) -> list[int]:
    """Of all blocks that were announced, in order, until nothing more comes."""
    import msgspec

    decoder, found = msgspec.msgpack.Decoder(KVEventBatch), []
    while events.poll(5000):
        batch = decoder.decode(events.recv_multipart()[-1])
        for event in batch.events:
            if isinstance(event, BlockStored):
                found += event.token_ids
    return found


def test_a_storm_leaves_tree_pool_and_disk_in_order(
    start: Callable[..., Server], cold: Answers, disk: Path
) -> None:
    server, stop = start(), threading.Event()
    trunk = fresh(2500)

    def branch(seed: int) -> None:
        """A conversation that leaves the trunk, or another's branch, somewhere, and goes on."""
        choose = random.Random(seed)
        ids = trunk[: choose.randrange(64, len(trunk))]
        for _ in range(4):
            ids = ids + prompt(300 + choose.randrange(8))[: choose.randrange(1, 300)]
            ids = ids + server.generate(ids, choose.randrange(1, 80))["output_ids"]
            if choose.random() < 0.3:
                ids = ids[: choose.randrange(64, len(ids))]

    with ThreadPoolExecutor(7) as pool:
        leaving = pool.submit(come_and_go, server, stop)
        for done in [pool.submit(branch, seed) for seed in range(30)]:
            done.result()
        for length in SOME:
            assert ask(server, fresh(length)) == pytest.approx(cold[length], abs=TOLERANCE)
        stop.set()
        assert leaving.result() > 0
    # SGLang checks for leaks when it is idle, and ends where there is one
    flush(server)
    time.sleep(3)
    assert server.is_healthy()
    assert "leak" not in server.log.read_text()
    assert pages(server).get("broken", 0) == 0
    assert run(["cache", "verify", str(disk)]) == 0


def test_two_ranks_find_their_pages_and_agree_where_one_of_them_does_not(
    start: Callable[..., Server], cold: Answers, disk: Path
) -> None:
    server, length = start("--tp-size", "2"), 2048
    answer = ask(server, fresh(length))
    assert answer == pytest.approx(cold[length], abs=TOLERANCE)
    flush(server)
    assert cached(server, length) == (length - 1) // 64 * 64
    flush(server)
    (lost, *_) = sorted(disk.glob("*/rank1/*.bin"))
    lost.write_bytes(lost.read_bytes()[:-1])
    assert ask(server, fresh(length)) == pytest.approx(answer, abs=TOLERANCE)
    # the first rank's file was good, and both computed the page again
    flush(server)
    assert cached(server, length) == (length - 1) // 64 * 64


def test_pages_of_other_settings_are_set_aside_in_one_line(
    start: Callable[..., Server], cold: Answers
) -> None:
    server = start(budget=192)
    said = [line for line in server.log.read_text().splitlines() if "is set aside" in line]
    assert any("written with another attention" in line for line in said)
    assert httpx.get(f"{server.url}/health", timeout=10).status_code == 200
    ask(server, fresh(1345))
    assert "read" not in pages(server)


def test_a_server_goes_on_without_a_disk_that_it_cannot_use(
    start: Callable[..., Server], cold: Answers
) -> None:
    server = start(path=Path("/proc/nothing"))
    assert server.log.read_text().count("cannot be used, and the server goes on without") == 1
    for length in SOME:
        for _ in range(2):
            assert ask(server, fresh(length)) == pytest.approx(cold[length], abs=TOLERANCE)
    assert pages(server)["skipped"] > 0
