"""Mixed traffic for as long as ``HIP_SGLANG_SOAK_MINUTES`` says, 30 where it says nothing.

Every answer is what it was alone, memory stays, no token of the pool is lost, and the log is clean.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import psutil
import pytest

from tests.server.test_batches import HIP
from tests.server.test_hostile import become_idle, flush
from tests.server.traffic import LONGEST, Traffic
from tests.servers import Serve, Server

MINUTES = float(os.environ.get("HIP_SGLANG_SOAK_MINUTES", "30"))
pytestmark = [
    pytest.mark.server,
    pytest.mark.soak,
    pytest.mark.timeout(60 * MINUTES + 1800),
]

CLIENTS = 12
PROMPTS = 16
ROUND_SECONDS = 60
# of the answers that are checked
FLIPS = 0.002
# of the prompts: pages, or sub-pages, that weigh the same to the last bit (docs/algorithm.md)
TIES = 0.01


def test_mixed_traffic(serve: Serve, record_property: Callable[[str, object], None]) -> None:
    server = serve("--hip-config", json.dumps(HIP), "--chunked-prefill-size", "1024")
    traffic = Traffic(server)
    end = time.monotonic() + 60 * MINUTES
    with resident_memory(server) as memory:
        for number in range(10_000):
            traffic.begin_round(seed=number, size=PROMPTS)
            traffic.mix(CLIENTS, min(ROUND_SECONDS, end - time.monotonic()), seed=number)
            if number == 0:
                traffic.crowd(200, longest=LONGEST // 4)
            if time.monotonic() >= end:
                break
        become_idle(server)
    summary = {"minutes": MINUTES, "rounds": number + 1, **dict(sorted(traffic.count.items()))}
    summary |= {"prompts": traffic.prompts, "prompts_with_ties": len(traffic.ties)}
    summary |= {"memory_mib": [size >> 20 for size in thirds(memory)]}
    print(json.dumps(summary))
    record_property("traffic", json.dumps(summary))

    assert not traffic.wrong, "\n".join(traffic.wrong[:5])
    assert traffic.count["flip"] <= FLIPS * traffic.count["checked"]
    assert len(traffic.ties) <= max(1, TIES * traffic.prompts), traffic.ties
    # a run in which some sort of client never came says nothing about it
    assert all(traffic.count[sort] for sort in ("answer", "stream", "batch", "left", "aborted"))
    assert all(traffic.count[sort] for sort in ("hung up", "refused", "crowd"))
    _, middle, last = thirds(memory)
    assert last <= 1.05 * middle, summary
    assert server.is_healthy()
    assert lost_tokens(server) == 0
    log = server.log.read_text()
    assert not [word for word in ("Traceback", "leak", " ERROR") if word in log]


def lost_tokens(server: Server) -> int:
    """KV tokens that are in use where no request and no cached prefix is."""
    flush(server)
    # the scheduler reports its load now and then
    time.sleep(2)
    loads = httpx.get(f"{server.url}/v1/loads", timeout=30).json()["loads"]
    return sum(load["num_used_tokens"] for load in loads)


@contextmanager
def resident_memory(server: Server) -> Iterator[list[int]]:
    """Bytes that all processes of the server hold, once a second."""
    sizes: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        root = psutil.Process(server.process.pid)
        while not stop.wait(1):
            tree = [root, *root.children(recursive=True)]
            sizes.append(sum(process.memory_info().rss for process in tree))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield sizes
    finally:
        stop.set()
        watcher.join()


def thirds(sizes: list[int]) -> tuple[int, int, int]:
    """The most of each third of the run."""
    cut = len(sizes) // 3
    return max(sizes[:cut]), max(sizes[cut:-cut]), max(sizes[-cut:])
