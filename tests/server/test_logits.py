"""Our keep-all against SGLang's torch_native: the same logits through the same server's doors."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.servers import Serve, Server

pytestmark = pytest.mark.server

# chunks of four pages, decode steps mixed into them
BATCHING = ("--chunked-prefill-size", "256", "--enable-mixed-chunk")


def prompt(length: int) -> list[int]:
    generator = random.Random(length)
    return [generator.randrange(1, 1024) for _ in range(length)]


def ask(server: Server, ids: list[int], new: int) -> dict[str, Any]:
    """Log-probabilities of the prompt's own tokens and of the five best at each new one."""
    body = {
        "input_ids": ids,
        "sampling_params": {"temperature": 0, "max_new_tokens": new, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 5,
    }
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=300).raise_for_status()
    meta: dict[str, Any] = answer.json()["meta_info"]
    return meta


def logprobs(meta: dict[str, Any]) -> list[float]:
    """Every number of an answer, in order."""
    given = [value for value, _, _ in meta["input_token_logprobs"] if value is not None]
    best = [pair[0] for step in meta["output_top_logprobs"] for pair in step]
    return [*given, *best]


def collect(server: Server) -> list[list[float]]:
    """A prompt in one chunk, in several, on a cached prefix; and a crowd that is mixed."""
    found = [logprobs(ask(server, prompt(length), 12)) for length in (1, 50, 64, 700)]
    longer = prompt(700)[:640] + prompt(90)
    found.append(logprobs(ask(server, longer, 3)))
    lengths = (900, 33, 510, 128, 700, 65)
    with ThreadPoolExecutor(len(lengths)) as pool:
        crowd = pool.map(lambda length: ask(server, prompt(length + 1000), 40), lengths)
        found += [logprobs(meta) for meta in crowd]
    return found


def test_keep_all_gives_the_logits_of_torch_native(serve: Serve) -> None:
    ours = collect(serve("--hip-preset", "dense", *BATCHING))
    theirs = collect(serve("--attention-backend", "torch_native", *BATCHING))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)
    # a comparison of nothing would pass as well
    assert sum(map(len, ours)) > 10_000
