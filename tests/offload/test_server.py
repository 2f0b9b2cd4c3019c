"""The real server with its KV in host memory answers as the one without, bit for bit."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.server import test_batches as batches
from tests.server.test_batches import ask, assert_same, come_and_go, prompt
from tests.server.test_hostile import flush
from tests.servers import Serve, Server

pytestmark = pytest.mark.server

HIP: dict[str, Any] = {**batches.HIP, "second_look": 0}
# one query reads six pages exactly, and two requests run; 4 KiB a token
DEVICE = 2 * 6 * 64
OFFLOAD = {"host_gib": 0.0625, "device_tokens": DEVICE}
CAPACITY = 16320
LONG = 16 * DEVICE
LENGTHS = (200, 1345, 2048, 2500)


def resident() -> tuple[str, ...]:
    # the same capacity, so that the same pages are given out and taken back
    return "--hip-config", json.dumps(HIP), "--max-total-tokens", str(CAPACITY)


def offloaded(**more: Any) -> tuple[str, ...]:
    config = {**HIP, "offload": {**OFFLOAD, **more}}
    return "--hip-config", json.dumps(config), "--enable-metrics"


def one_after_the_other(server: Server) -> dict[str, list[float]]:
    """Long prompts, prefixes that eight share and part from, and each of them again."""
    flush(server)
    found = {"long": ask(server, prompt(LONG))}
    for length in LENGTHS:
        found[f"cold {length}"] = ask(server, prompt(length))
    shared = prompt(2500)
    for number, cut in enumerate((2400, 2368, 2048, 1900, 1345, 700, 640, 63)):
        found[f"parts at {cut}"] = ask(server, shared[:cut] + prompt(1100 + number)[:300])
    for length in (LONG, *LENGTHS):
        found[f"cached {length}"] = ask(server, prompt(length))
    return found


@pytest.fixture(scope="module")
def expected(serve: Serve) -> Iterator[dict[str, list[float]]]:
    yield one_after_the_other(serve(*resident()))
    serve.stop()


def test_a_prompt_of_sixteen_devices_and_all_others_keep_their_bits(
    serve: Serve, expected: dict[str, list[float]]
) -> None:
    found = one_after_the_other(serve(*offloaded()))
    for what, values in expected.items():
        assert found[what] == values, what


def test_nothing_is_lost_in_a_crowd_that_comes_and_goes(
    serve: Serve, expected: dict[str, list[float]]
) -> None:
    server = serve(*offloaded())
    flush(server)
    alone = {length: expected[f"cold {length}"] for length in LENGTHS}
    crowd = list(LENGTHS) * 2
    random.Random(1).shuffle(crowd)
    stop = threading.Event()
    with ThreadPoolExecutor(len(crowd) + 1) as pool:
        leaving = pool.submit(come_and_go, server, stop)
        asked = [(length, pool.submit(ask, server, prompt(length))) for length in crowd]
        answers = [(length, answer.result()) for length, answer in asked]
        stop.set()
        assert leaving.result() > 0
    for length, values in answers:
        assert_same({length: values}, alone)
    # SGLang checks for leaks when it is idle, and ends where there is one
    flush(server)
    time.sleep(2)
    assert server.is_healthy()
    assert "leak" not in server.log.read_text()


def test_what_moved_is_counted(serve: Serve, expected: dict[str, list[float]]) -> None:
    server = serve(*offloaded())
    flush(server)
    before = counted(server)
    ask(server, prompt(2500))
    moved = {name: value - before[name] for name, value in counted(server).items()}
    # float32, four layers of two KV heads of 64 channels; the last new token is never read
    token, tokens = 4 * 2 * 2 * 64 * 4, 2500 + 23
    assert moved["written_bytes_total"] == token * tokens
    assert moved["fetched_bytes_total"] == moved["fetched_pages_total"] * token * 64 / (4 * 2)
    assert 0 < moved["held_pages_total"] < moved["chosen_pages_total"]
    assert 0 < moved["stalls_total"] <= moved["fetched_pages_total"]
    assert moved["estimated_pages_total"] == 0
    assert counted(server)["device_used_share"] == 1
    assert (
        f"logical {CAPACITY:,} tokens = 64.0 MiB host; device cache 768 tokens"
        in server.log.read_text()
    )


def counted(server: Server) -> dict[str, float]:
    lines = httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines()
    prefix = "hip_sglang_offload_"
    return {
        name.removeprefix(prefix): float(number)
        for name, _, number in (line.rpartition(" ") for line in lines)
        if name.startswith(prefix)
    }


@pytest.mark.soak
def test_requests_that_host_memory_is_too_small_for_are_retracted_and_answered(
    serve: Serve, expected: dict[str, list[float]]
) -> None:
    # 2,048 tokens in all
    server = serve(*offloaded(host_gib=0.0080), "--schedule-conservativeness", "0.01")
    new = 400
    ids = [prompt(700), prompt(701)[::-1]]
    alone = [server.generate(one, new)["output_ids"] for one in ids]
    flush(server)
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda one: server.generate(one, new)["output_ids"], ids))
    assert [len(found) for found in together] == [new, new]
    assert "retract" in server.log.read_text().lower()
    for one, other in zip(alone, together, strict=True):
        assert other[:24] == one[:24]
    flush(server)
    assert server.is_healthy()


@pytest.mark.soak
def test_two_ranks_answer_as_one_does(serve: Serve, expected: dict[str, list[float]]) -> None:
    server = serve(*offloaded(), "--tp-size", "2")
    flush(server)
    found = {length: ask(server, prompt(length)) for length in LENGTHS}
    assert_same(found, {length: expected[f"cold {length}"] for length in LENGTHS})


@pytest.mark.soak
def test_misses_may_be_estimated(serve: Serve) -> None:
    server = serve(*offloaded(miss_policy="estimate"))
    flush(server)
    for length in LENGTHS:
        assert len(ask(server, prompt(length))) == 5 * batches.NEW
    assert counted(server)["estimated_pages_total"] > 0
