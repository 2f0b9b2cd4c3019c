"""What a request reads does not depend on where its pages are: the same bits with offload."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hip_kernels.layout import PAGE_SIZE
from hip_kernels.page_cache import Counts

from tests.attention import served
from tests.attention.served import Served

# one query reads 7 pages exactly; two requests run
SMALL = {"sink": 64, "window": 128, "budget": 192, "dense_threshold": 0}
STEP = 7 * PAGE_SIZE


@pytest.fixture(autouse=True)
def _two_kv_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    # each has slots of its own
    monkeypatch.setattr(served, "KV_HEADS", 2)


def schedule(rig: Served, seed: int, steps: int) -> list[torch.Tensor]:
    """Two rows of requests that come in chunks, decode, share nothing, leave, and are followed."""
    choose, outputs = random.Random(seed), []
    for _ in range(steps):
        row = choose.randrange(2)
        alive = sorted(rig.lengths)
        action = choose.random()
        if row not in rig.lengths:
            rig.prompt(row, choose.choice([1, 63, 64, 700, 1500]))
        elif action < 0.2 and rig.lengths[row] < 3000:
            rig.prompt(row, choose.choice([64, 65, 640]))
        elif action < 0.25:
            rig.leave(row)
        else:
            for each in alive:
                rig.grow(each, 1)
            outputs += rig.decode(alive, rig.tensors(len(alive)))
    return outputs


def outputs(hip: dict[str, Any], seed: int = 0, steps: int = 40, **kwargs: Any):
    rig = Served(hip, **kwargs)
    found = schedule(rig, seed, steps)
    assert len(found) > steps / 2
    return rig, found


@pytest.mark.parametrize(
    "hip",
    [
        {},
        # what is used again, as what is brought, are whole pages
        {"second_look": 2, "refresh": 2},
        {"top_p": 0.9, "remainder": "log_cosh"},
        {"remainder": "none"},
        {"refresh": 4},
        {"dense_threshold": 640},
        {"node_threshold": 512, "beam": 512, "sub_page_means": False},
    ],
    ids=str,
)
def test_offloaded_outputs_are_those_of_a_resident_pool_bit_for_bit(hip: dict[str, Any]) -> None:
    hip = {**SMALL, "second_look": 0, **hip}
    tokens = 2 * max(STEP, hip["dense_threshold"])
    _, resident = outputs(hip)
    rig, offloaded = outputs({**hip, "offload": {"host_gib": 1, "device_tokens": tokens}})
    assert all(map(torch.equal, resident, offloaded))
    # and the device was too small to hold what was read
    fetched = sum(int(cache.counts[Counts.FETCHED]) for cache in rig.runner.token_to_kv_pool.caches)
    assert fetched > 4 * rig.runner.token_to_kv_pool.caches[0].slots


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_so_are_those_of_a_pool_in_fewer_bits(dtype: torch.dtype) -> None:
    hip = {**SMALL, "second_look": 0}
    offload = {"host_gib": 1, "device_tokens": 2 * STEP}
    _, resident = outputs(hip, dtype=dtype)
    _, offloaded = outputs({**hip, "offload": offload}, dtype=dtype)
    assert all(map(torch.equal, resident, offloaded))


def test_any_sufficient_device_gives_the_same_bits() -> None:
    found = [
        outputs({**SMALL, "offload": {"host_gib": 1, "device_tokens": pages * STEP}}, seed=3)[1]
        for pages in (2, 3, 11)
    ]
    assert all(map(torch.equal, found[0], found[1]))
    assert all(map(torch.equal, found[0], found[2]))
