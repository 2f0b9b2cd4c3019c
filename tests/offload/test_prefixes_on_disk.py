"""The real server finds prefixes again on its disk: after a flush, a kill, harm to its files."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from hip_sglang.cli import run
from tests.offload.test_server import CAPACITY, HIP, OFFLOAD
from tests.server.test_batches import TOLERANCE, ask, prompt
from tests.server.test_hostile import flush
from tests.servers import Serve, Server

pytestmark = pytest.mark.server

# one is more than half of host memory
LENGTHS = (200, 1345, 2048, 2500, CAPACITY // 2 + 100, 8 * OFFLOAD["device_tokens"])

Answers = dict[int, list[float]]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def start(serve: Serve, disk: Path) -> Callable[[], Server]:
    """The server that uses the disk, started again where it was killed."""
    config = {**HIP, "offload": {**OFFLOAD, "disk": {"path": str(disk), "gib": 1}}}
    return lambda: serve("--hip-config", json.dumps(config), "--enable-metrics")


@pytest.fixture(scope="module")
def cold(start: Callable[[], Server]) -> Answers:
    """Each prompt when nothing of it is known; afterwards all of it is on disk."""
    server, found = start(), {}
    for length in LENGTHS:
        flush(server)
        found[length] = ask(server, fresh(length))
    flush(server)
    return found


def fresh(length: int) -> list[int]:
    """A prompt that shares no page with those of other lengths."""
    return [length % 1000 + 1, *prompt(length)[1:]]


def assert_cold(server: Server, cold: Answers, lengths: tuple[int, ...] = LENGTHS) -> None:
    for length in lengths:
        assert ask(server, fresh(length)) == pytest.approx(cold[length], abs=TOLERANCE), length


def pages(server: Server) -> dict[str, float]:
    """Of each kind, by the server's metrics."""
    found = {}
    for line in httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines():
        if line.startswith("hip_sglang_disk_pages_total"):
            name, _, value = line.rpartition(" ")
            found[name.split('kind="')[1].split('"')[0]] = float(value)
    return found


def cached(server: Server, length: int) -> int:
    """Tokens of a prompt that need no computing."""
    return int(server.generate(fresh(length), 1)["meta_info"]["cached_tokens"])


def test_a_prefix_that_was_dropped_comes_back_without_being_computed(
    start: Callable[[], Server], cold: Answers
) -> None:
    server = start()
    before = pages(server)
    assert_cold(server, cold)
    read = pages(server)["read"] - before.get("read", 0)
    # all but the page of the last token, which a prompt always computes
    assert read == sum((length - 1) // 64 for length in LENGTHS)
    for length in LENGTHS:
        flush(server)
        assert cached(server, length) == (length - 1) // 64 * 64


def test_a_prefix_of_eight_devices_moves_only_the_pages_that_are_chosen(
    start: Callable[[], Server], cold: Answers
) -> None:
    server = start()
    length = LENGTHS[-1]
    # the tail is computed, and reads what it selects
    for lost in (True, False):
        if lost:
            flush(server)
        before = fetched(server)
        assert cached(server, length) == (length - 1) // 64 * 64
        moved = fetched(server) - before
        page = 4 * 2 * 64 * 64 * 4 * 2  # of four layers of two heads
        # sink, window, budget and its own page
        assert moved <= 6 * page < (length // 64) * page / 10


def fetched(server: Server) -> float:
    for line in httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines():
        if line.startswith("hip_sglang_offload_fetched_bytes_total"):
            return float(line.rpartition(" ")[2])
    return 0.0


def test_a_document_is_warmed_and_known_then(
    start: Callable[[], Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, file = start(), tmp_path / "document.txt"
    file.write_text("".join(f"word {number} " for number in range(500)))
    known = []
    for _ in range(2):
        flush(server)
        assert run(["cache", "warm", str(file), "--url", server.url]) == 0
        said = capsys.readouterr().out
        known.append(int(said.split()[-2].replace(",", "")))
    assert known[0] == 0
    # the last token is always computed
    assert known[1] > 640
    assert known[1] % 64 == 0


def test_one_tenant_s_prefix_is_not_another_s(start: Callable[[], Server], cold: Answers) -> None:
    server = start()
    flush(server)
    before = pages(server)
    assert ask(server, fresh(1345), extra_key="other") == pytest.approx(cold[1345], abs=TOLERANCE)
    assert pages(server)["read"] == before["read"]


def test_files_that_were_harmed_are_computed_again(
    start: Callable[[], Server], cold: Answers, disk: Path
) -> None:
    server = start()
    flush(server)
    choose = random.Random(0)
    files = sorted(disk.glob("*/rank0/*.bin"))
    for file in choose.sample(files, 30):
        match choose.randrange(3):
            case 0:
                file.unlink()
            case 1:
                os.truncate(file, choose.randrange(file.stat().st_size))
            case 2:
                data = bytearray(file.read_bytes())
                data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
                file.write_bytes(data)
    assert_cold(server, cold)
    counted = pages(server)
    assert counted["broken"] > 0
    assert server.log.read_text().count("cannot be used and is computed again") == 1
    # and they were written again
    flush(server)
    for length in LENGTHS:
        assert cached(server, length) == (length - 1) // 64 * 64
    assert pages(server)["broken"] == counted["broken"]


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, 6))]
)
def test_a_server_that_was_killed_answers_right_when_it_is_back(
    start: Callable[[], Server], cold: Answers, seed: int
) -> None:
    choose, server = random.Random(seed), start()
    # at a random point of reading, computing or writing behind
    new = [choose.randrange(1, 1000) for _ in range(6000)]
    asked = (new, fresh(choose.choice(LENGTHS)), new[:3000] + fresh(1345))
    threads = [threading.Thread(target=ask_until_killed, args=(server, ids)) for ids in asked]
    for thread in threads:
        thread.start()
    time.sleep(choose.random() * 4)
    server.stop()
    for thread in threads:
        thread.join()
    server = start()
    assert_cold(server, cold)
    assert pages(server).get("broken", 0) == 0
    assert pages(server)["read"] > 0
    again = ask(server, new)
    # in a namespace where nothing is known
    assert again == pytest.approx(ask(server, new, extra_key=str(seed)), abs=TOLERANCE)


def ask_until_killed(server: Server, ids: list[int]) -> None:
    try:
        ask(server, ids)
    except httpx.HTTPError:
        return
