"""The kernels that bring pages to the device against the reference, on Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from hip_kernels.layout import PAGE_SIZE, SparsePlan
from hip_kernels.offloaded import OffloadedKV
from hip_kernels.page_cache import Counts, HostPages, PageCache
from hip_kernels.resolve import triton as module
from hip_kernels.resolve.reference import resolve
from hip_kernels.select.weigh import lookup
from hip_kernels.steps import NO_PAGE
from torch import Tensor

# two steps of seven pages each
HEADS, PAGES, SLOTS = 2, 60, 14
PLAN = SparsePlan(sink_pages=1, window_pages=2, budget_pages=3)


@pytest.fixture
def kernels(interpreted: Callable[[ModuleType], ModuleType]) -> ModuleType:
    return interpreted(module)


def offloaded(width: int = 20, value_width: int = 12, dtype: torch.dtype = torch.float32):
    host = HostPages.empty(PAGES, HEADS, width, value_width, dtype)
    host.rows.copy_(torch.randn(host.rows.shape))
    return OffloadedKV(host, PageCache.empty(SLOTS, host, "cpu"), dtype)


def copied(kv: OffloadedKV) -> OffloadedKV:
    cache = PageCache(**{name: tensor.clone() for name, tensor in vars(kv.cache).items()})
    host = replace(kv.host, rows=kv.host.rows.clone())
    return OffloadedKV(host, cache, kv.dtype)


def same(one: OffloadedKV, other: OffloadedKV) -> None:
    for name, tensor in vars(one.cache).items():
        assert torch.equal(tensor, vars(other.cache)[name]), name
    assert torch.equal(one.host.rows, other.host.rows)


def wanted(
    table: Tensor, page: Tensor, chosen: Tensor | None, row: Tensor, sparse_from: int
) -> Tensor:
    """What the reference is asked for, [Hkv, N * most]: the same entries in the same order."""
    most = table.shape[1]
    if chosen is not None:
        exact = PLAN.sink_pages + chosen.shape[2] + PLAN.window_pages + 1
        most = max(exact, min(most, sparse_from))
    column = torch.arange(most)
    every = column.where(column <= page[:, None], -1)[:, None].expand(-1, HEADS, -1)
    if chosen is not None:
        fixed = PLAN.with_fixed_pages(chosen[row], page)
        fixed = torch.nn.functional.pad(fixed, (0, most - fixed.shape[2]), value=-1)
        every = fixed.where((page >= sparse_from)[:, None, None], every)
    every = every.transpose(0, 1)
    found = lookup(table, every).where(every >= 0, -1)
    return found.flatten(1)


@pytest.mark.parametrize("sparse_from", [0, 8], ids=["sparse", "some are dense"])
def test_steps_bring_what_the_reference_brings(kernels: ModuleType, sparse_from: int) -> None:
    torch.manual_seed(sparse_from)
    kv = offloaded()
    like = copied(kv)
    table = torch.stack([torch.randperm(PAGES)[:20] for _ in range(2)])
    chosen = torch.full((3, HEADS, 3), -1)
    for step in range(12):
        page = torch.tensor([19, 6 if sparse_from else 13])
        for head in range(HEADS):
            for row, own in ((2, 19), (0, int(page[1]))):
                some = torch.randperm(max(own - 3, 1))[: step % 4] + 1
                chosen[row, head] = -1
                chosen[row, head, : len(some)] = some.sort().values
        row, reuses = torch.tensor([2, 0]), torch.tensor([0, step % 2], dtype=torch.int32)
        before = kv.cache.counts.clone()
        kernels.bring(kv, table, page, chosen, row, reuses, PLAN, sparse_from, False)
        asked = wanted(table, page, chosen, row, sparse_from)
        # the door counts what searches found, and not what is brought
        searched = chosen[row][(reuses == 0) & (page >= sparse_from)]
        here = lookup(table, chosen[row].transpose(0, 1))
        held = like.held(here) & (chosen[row].transpose(0, 1) >= 0)
        held = held[:, (reuses == 0) & (page >= sparse_from)]
        resolve(like.host, like.cache, asked)
        like.cache.counts[Counts.CHOSEN] += (searched >= 0).sum()
        like.cache.counts[Counts.HELD] += held.sum()
        same(kv, like)
        assert (kv.cache.counts[Counts.FETCHED] > before[Counts.FETCHED]) or step
    assert 0 < kv.cache.counts[Counts.HELD] < kv.cache.counts[Counts.CHOSEN]
    # pages had to go, and every copy is its original
    assert kv.cache.counts[Counts.FETCHED] > 2 * SLOTS
    head, slot = (kv.cache.page >= 0).nonzero(as_tuple=True)
    page = kv.cache.page[head, slot].long()
    assert torch.equal(kv.cache.key[head, slot], kv.host.key[page, head])
    assert torch.equal(kv.cache.value[head, slot], kv.host.value[page, head])
    assert torch.equal(kv.cache.slot[head, page].long(), slot)


def test_blocks_of_a_prompt_share_a_table_and_pages(kernels: ModuleType) -> None:
    kv = offloaded(width=64, value_width=64, dtype=torch.float16)
    like = copied(kv)
    table = torch.randperm(PAGES)[None, :12]
    page, row = torch.arange(4) + 8, torch.arange(4)
    fresh = torch.zeros(4, dtype=torch.int32)
    for chosen in (torch.tensor([1, 3, 4]).expand(4, HEADS, 3).contiguous(), None):
        start = 0 if chosen is not None else NO_PAGE
        kernels.bring(kv, table, page, chosen, row, fresh, PLAN, start, False)
        resolve(like.host, like.cache, wanted(table, page, chosen, row, start))
        kv.cache.counts[: Counts.FETCHED] = 0
        same(kv, like)


def test_tokens_are_written_to_host_memory_and_to_copies(kernels: ModuleType) -> None:
    kv = offloaded()
    page, row = torch.tensor([5]), torch.tensor([0])
    fresh = torch.zeros(1, dtype=torch.int32)
    kernels.bring(kv, torch.arange(6)[None] + 10, page, None, row, fresh, PLAN, NO_PAGE, False)
    like = copied(kv)
    slots = torch.tensor([10, 3, 15, 40]) * PAGE_SIZE + torch.tensor([0, 63, 7, 1])
    key, value = torch.randn(4, HEADS, 20), torch.randn(4, HEADS, 12)
    kernels.write(kv, slots, key, value)
    like.write(slots, key, value)
    same(kv, like)
    assert torch.equal(kv.host.key[3, :, 63], key[1])


def test_bad_arguments_are_named(kernels: ModuleType) -> None:
    kv = offloaded()
    page, row = torch.tensor([5]), torch.tensor([0])
    fresh = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(AssertionError, match=r"page is torch\.int32"):
        kernels.bring(kv, torch.arange(6)[None], page.int(), None, row, fresh, PLAN, NO_PAGE, False)
    with pytest.raises(AssertionError, match="table is of 2 blocks"):
        kernels.bring(kv, torch.zeros(2, 6).long(), page, None, row, fresh, PLAN, NO_PAGE, False)
    with pytest.raises(AssertionError, match="key has the shape"):
        kernels.write(kv, row, torch.zeros(1, 1, 20), torch.zeros(1, HEADS, 12))
