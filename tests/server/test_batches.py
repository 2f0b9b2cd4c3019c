"""What a request gets does not depend on chunks, on the cache, or on who else is there.

Sparse attention in all of its forms on one small model: prompts that prune, decode steps that look
twice, that search through nodes, and that use again what they chose.
"""

from __future__ import annotations

import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import httpx
import pytest

from tests.server.test_hostile import flush
from tests.servers import Serve, Server

pytestmark = pytest.mark.server

HIP = {
    "sink": 64,
    "window": 128,
    "budget": 128,
    "dense_threshold": 256,
    "node_threshold": 1024,
    "beam": 512,
    "refresh": 3,
}
SPARSE = ("--hip-config", json.dumps(HIP), "--enable-metrics")
LENGTHS = (200, 1130, 1345, 2047, 2048, 2500, 2680)
NEW = 24  # on the way some complete a page
# log-probabilities: other shapes add in another order
TOLERANCE = 2e-4


@cache
def prompt(length: int) -> list[int]:
    """Tokens that are related to what was before, so that some pages matter more than others."""
    generator = random.Random(length)
    ids = [generator.randrange(1, 1024) for _ in range(300)]
    while len(ids) < length:
        start = generator.randrange(len(ids) - 40)
        ids += (
            ids[start : start + 40] if generator.random() < 0.5 else [generator.randrange(1, 1024)]
        )
    return ids[:length]


def ask(server: Server, ids: list[int], **more: Any) -> list[float]:
    """Log-probabilities of what a prompt leads to: the five best at each new token."""
    body: dict[str, Any] = {
        "input_ids": ids,
        "sampling_params": {"temperature": 0, "max_new_tokens": NEW, "ignore_eos": True},
        "return_logprob": True,
        "top_logprobs_num": 5,
        **more,
    }
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=300).raise_for_status()
    best = answer.json()["meta_info"]["output_top_logprobs"]
    return [value for step in best for value, _, _ in step]


@pytest.fixture(scope="module")
def alone(serve: Serve) -> dict[int, list[float]]:
    """Each prompt by itself, nothing cached."""
    server = serve(*SPARSE)
    found = {}
    for length in LENGTHS:
        flush(server)
        found[length] = ask(server, prompt(length))
        assert len(found[length]) == 5 * NEW
    return found


def assert_same(found: dict[int, list[float]], alone: dict[int, list[float]]) -> None:
    for length, values in found.items():
        assert values == pytest.approx(alone[length], abs=TOLERANCE), length


@pytest.mark.soak
def test_sparse_attention_was_at_work(serve: Serve, alone: dict[int, list[float]]) -> None:
    everything = serve("--hip-preset", "dense")
    for length in LENGTHS[1:]:
        far = [
            abs(a - b) for a, b in zip(ask(everything, prompt(length)), alone[length], strict=True)
        ]
        assert max(far) > 10 * TOLERANCE


def test_the_same_schedule_gives_the_same_bits(serve: Serve, alone: dict[int, list[float]]) -> None:
    server = serve(*SPARSE)
    for length in (1130, 2500):
        flush(server)
        assert ask(server, prompt(length)) == alone[length]


def test_a_radix_hit_changes_nothing(serve: Serve, alone: dict[int, list[float]]) -> None:
    server = serve(*SPARSE)
    flush(server)
    for length in LENGTHS:
        ask(server, prompt(length))
    assert_same({length: ask(server, prompt(length)) for length in reversed(LENGTHS)}, alone)


@pytest.mark.soak
def test_a_prompt_that_is_read_densely_is_so_to_its_last_token(serve: Serve) -> None:
    server = serve("--hip-preset", "quality", "--enable-mixed-chunk", *SPARSE)
    flush(server)
    cold = {1345: ask(server, prompt(1345))}
    # all but one token are cached now: it comes as a decode step does
    assert_same({1345: ask(server, prompt(1345))}, cold)


def test_a_prefix_that_others_part_from_changes_nothing(
    serve: Serve, alone: dict[int, list[float]]
) -> None:
    server = serve(*SPARSE)
    flush(server)
    ids = prompt(2500)
    # in the middle of a page, at a page, at a node, and long before
    for cut in (2400, 2368, 2048, 700):
        ask(server, ids[:cut] + prompt(1100)[:400])
    assert_same({2500: ask(server, ids)}, alone)


def test_metrics_tell_what_was_done(serve: Serve, alone: dict[int, list[float]]) -> None:
    server = serve(*SPARSE)
    ask(server, prompt(1130))
    lines = httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines()
    counted = {
        name: float(number)
        for name, _, number in (line.rpartition(" ") for line in lines)
        if name.startswith("hip_sglang_")
    }
    fresh = counted['hip_sglang_choices_total{kind="fresh"}']
    # two steps in three use again what was chosen
    assert counted['hip_sglang_choices_total{kind="reused"}'] > fresh > 0
    for phase in ("prefill", "decode"):
        blocks = counted[f'hip_sglang_query_blocks_total{{kind="sparse",phase="{phase}"}}']
        pages = {
            kind: counted[f'hip_sglang_{kind}_pages_total{{phase="{phase}"}}'] / blocks
            for kind in ("chosen", "exact", "visible")
        }
        assert 1 <= pages["chosen"] <= 2
        # sink, window and its own
        assert pages["exact"] == pages["chosen"] + 4
        assert pages["visible"] > pages["exact"]
        assert 0 < counted[f'hip_sglang_estimated_mass_total{{phase="{phase}"}}'] < blocks


def test_who_else_is_there_changes_nothing(serve: Serve, alone: dict[int, list[float]]) -> None:
    server = serve(*SPARSE)
    flush(server)
    order = random.Random(1)
    crowd = list(LENGTHS) * 2
    order.shuffle(crowd)
    stop = threading.Event()
    with ThreadPoolExecutor(len(crowd) + 1) as pool:
        leaving = pool.submit(come_and_go, server, stop)
        asked = []
        for length in crowd:
            asked.append((length, pool.submit(ask, server, prompt(length))))
            time.sleep(order.random() / 4)
        answers = [(length, answer.result()) for length, answer in asked]
        stop.set()
        assert leaving.result() > 0
    for length, values in answers:
        assert_same({length: values}, alone)


def come_and_go(server: Server, stop: threading.Event) -> int:
    """Requests that are aborted in the middle, so that their rows and pages go to others."""
    count = 0
    with ThreadPoolExecutor(1) as pool:
        while not stop.is_set():
            rid = f"leaves-{count}"
            answer = pool.submit(ask, server, prompt(1900 + count), rid=rid)
            time.sleep(0.4)
            httpx.post(f"{server.url}/abort_request", json={"rid": rid}, timeout=60)
            assert isinstance(answer.exception(), httpx.HTTPError | KeyError | None)
            count += 1
    return count


@pytest.mark.parametrize(
    "size",
    [
        pytest.param(("64",), id="a page", marks=pytest.mark.soak),
        pytest.param(("704",), id="no divisor", marks=pytest.mark.soak),
        # not all have room at once
        pytest.param(("1024", "--max-total-tokens", "4096"), id="short of memory"),
    ],
)
def test_chunks_and_mixed_batches_change_nothing(
    serve: Serve, alone: dict[int, list[float]], size: tuple[str, ...]
) -> None:
    server = serve(*SPARSE, "--enable-mixed-chunk", "--chunked-prefill-size", *size)
    assert_same({length: ask(server, prompt(length)) for length in (1130, 2500)}, alone)
    by_itself = [tokens(server, length) for length in LENGTHS]
    flush(server)
    # SGLang mixes no decode step in beside a request for log-probabilities, but makes room for it
    with ThreadPoolExecutor(len(LENGTHS)) as pool:
        crowd = dict(zip(LENGTHS, pool.map(lambda n: ask(server, prompt(n)), LENGTHS), strict=True))
    assert_same(crowd, alone)
    flush(server)
    with ThreadPoolExecutor(len(LENGTHS)) as pool:
        mixed = list(pool.map(lambda length: tokens(server, length), LENGTHS))
    for length, expected, found in zip(LENGTHS, by_itself, mixed, strict=True):
        sure = before_a_tie(alone[length])
        assert found[:sure] == expected[:sure]


def tokens(server: Server, length: int) -> list[int]:
    ids: list[int] = server.generate(prompt(length), NEW)["output_ids"]
    return ids


def before_a_tie(values: list[float]) -> int:
    """How many of the first tokens stay the best if every value may be off by the tolerance."""
    leads = [values[at] - values[at + 1] for at in range(0, len(values), 5)]
    return next((n for n, lead in enumerate(leads) if lead < 2 * TOLERANCE), len(leads))
