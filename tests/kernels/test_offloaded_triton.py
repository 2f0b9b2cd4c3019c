"""Kernels that read copies on the device give the bits that they give on a resident pool."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hip_kernels.attend import fused, reference
from hip_kernels.blocks import plan_blocks
from hip_kernels.layout import PAGE_SIZE, SparsePlan, Summaries
from hip_kernels.offloaded import OffloadedKV
from hip_kernels.page_cache import Counts, HostPages, PageCache
from hip_kernels.stored import PagedKV
from hip_kernels.summarize import triton as summarizing

from tests.kernels import door
from tests.kernels.test_attend import queries

# two decode steps of nine pages each; a prompt's blocks go in waves of two
SLOTS = 18
LIMITS = {"sparse_from": 256, "sparse_decode_from": 128}


@pytest.fixture(autouse=True)
def _kernels(interpreted: Callable[[ModuleType], ModuleType]) -> None:
    interpreted(fused)


def offload(kv: PagedKV, policy: Any = "fetch") -> OffloadedKV:
    slots, heads, width = kv.key.shape
    host = HostPages.empty(slots // PAGE_SIZE, heads, width, kv.value.shape[2], kv.key.dtype)
    for stored, rows in ((host.key, kv.key), (host.value, kv.value)):
        stored.copy_(rows.view(-1, PAGE_SIZE, heads, rows.shape[2]).transpose(1, 2))
    cache = PageCache.empty(SLOTS, host, "cpu")
    return OffloadedKV(host, cache, kv.key.dtype, policy, kv.key_scale, kv.value_scale)


def test_blocks_and_steps_read_copies() -> None:
    plan = SparsePlan(
        sink_pages=1, window_pages=2, budget_pages=5, second_look=2, top_p=0.6, logit_cap=3.0
    )
    # two decode steps, a chunk of six blocks that prune but one, and one that keeps every page
    shapes = [(900, 1), (703, 1), (300, 340), (0, 50)]
    requests = door.make_requests(shapes, heads=2, width=24, value_width=40)
    here = door.scatter(requests, scales=(0.5, 2.0))
    kv = offload(here.kv)
    query = queries(requests, 6, 24)
    blocks = plan_blocks(
        [request.prefix for request in requests],
        [request.length for request in requests],
        here.page_table,
        **LIMITS,
    )
    found = []
    for stored in (here.kv, kv):
        out = torch.full((query.shape[0], 6, 40), float("nan"))
        for some in blocks:
            fused.attend(query, stored, here.summaries, some, plan, 0.2, out)
        found.append(out)
    assert torch.equal(*found)
    assert not found[0].isnan().any()
    assert kv.cache.counts[Counts.FETCHED] > 2 * SLOTS, "pages had to go"
    assert 0 < kv.cache.counts[Counts.HELD] < kv.cache.counts[Counts.CHOSEN]


def test_summaries_are_made_from_host_memory() -> None:
    requests = door.make_requests([(700, 1)], heads=2, width=24, value_width=40)
    here = door.scatter(requests, scales=(0.5, 2.0))
    pages = torch.cat([here.page_table[0, :10], torch.tensor([-1])])
    made = []
    for kv in (here.kv, offload(here.kv)):
        out = Summaries.empty(here.summaries.pages, 2, 24, 40)
        summarizing.summarize(kv, pages, out)
        made.append(out)
    for one, other in zip(made[0].tensors, made[1].tensors, strict=True):
        assert torch.equal(one, other)
    assert made[0].sigma.any()


def test_a_missed_page_is_left_to_the_remainder_and_there_the_next_time() -> None:
    plan = SparsePlan(sink_pages=1, window_pages=2, budget_pages=5)
    requests = door.make_requests([(900, 1), (703, 1)], heads=2, width=24, value_width=40)
    here = door.scatter(requests)
    query = queries(requests, 6, 24)
    (blocks,) = plan_blocks([900, 703], [901, 704], here.page_table, **LIMITS)
    by_kernels, plainly = (offload(here.kv, "estimate") for _ in range(2))
    outs = []
    for step in range(2):
        for attend, kv in ((fused.attend, by_kernels), (reference.attend, plainly)):
            out = torch.full((2, 6, 40), float("nan"))
            selection = attend(query, kv, here.summaries, blocks, plan, 0.2, out)
            assert selection is not None
            assert (selection.choice.entries >= 0).all(), "what was chosen is kept as it was"
            outs.append(out)
            assert kv.cache.counts[Counts.ESTIMATED] == 2 * 2 * 5
            assert kv.cache.counts[Counts.HELD] == step * 2 * 2 * 5
        torch.testing.assert_close(outs[-1], outs[-2], rtol=1e-4, atol=1e-5)
    resident = torch.empty(2, 6, 40)
    reference.attend(query, here.kv, here.summaries, blocks, plan, 0.2, resident)
    assert not torch.allclose(outs[0], resident, rtol=1e-3), "they were not attended"
    torch.testing.assert_close(outs[-1], resident, rtol=1e-4, atol=1e-5)
