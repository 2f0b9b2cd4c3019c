"""Random traffic against a plain model: what is read is what was written, wherever it lies."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hip_kernels.layout import PAGE_SIZE
from hip_kernels.offloaded import OffloadedKV
from hip_kernels.page_cache import Counts, HostPages, PageCache
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

HEADS, WIDTH, VALUE_WIDTH, PAGES, SLOTS = 2, 4, 3, 12, 5


class Traffic(RuleBasedStateMachine):
    """Requests share pages, grow, part, and leave, on a device that holds few of them."""

    def __init__(self) -> None:
        super().__init__()
        host = HostPages.empty(PAGES, HEADS, WIDTH, VALUE_WIDTH, torch.float32)
        self.kv = OffloadedKV(host, PageCache.empty(SLOTS, host, "cpu"), torch.float32)
        self.free = list(range(PAGES))
        self.users: dict[int, int] = {}
        self.requests: list[list[int]] = []  # pages, of which the last is being filled
        self.filled: list[int] = []  # tokens in the last page
        self.written: dict[tuple[int, int], torch.Tensor] = {}  # (page, offset) -> [Hkv, D + Dv]
        self.number = 0

    def write(self, tokens: list[tuple[int, int]]) -> None:
        rows = torch.empty(len(tokens), HEADS, WIDTH + VALUE_WIDTH)
        for row, where in enumerate(tokens):
            self.number += 1
            rows[row] = torch.arange(HEADS * (WIDTH + VALUE_WIDTH)).view(HEADS, -1) + self.number
            self.written[where] = rows[row]
        slots = torch.tensor([page * PAGE_SIZE + offset for page, offset in tokens])
        self.kv.write(slots, rows[..., :WIDTH], rows[..., WIDTH:])

    @precondition(lambda self: self.free)
    @rule()
    def arrive(self) -> None:
        page = self.free.pop()
        self.users[page] = 1
        self.requests.append([page])
        self.filled.append(0)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), tokens=st.integers(1, 2 * PAGE_SIZE))
    def grow(self, data: st.DataObject, tokens: int) -> None:
        """A decode step, or a chunk of a prompt."""
        which = data.draw(st.integers(0, len(self.requests) - 1))
        pages, places = self.requests[which], []
        for _ in range(tokens):
            if self.filled[which] == PAGE_SIZE:
                if not self.free:
                    break
                pages.append(self.free.pop())
                self.users[pages[-1]] = 1
                self.filled[which] = 0
            places.append((pages[-1], self.filled[which]))
            self.filled[which] += 1
        if places:
            self.write(places)

    @precondition(lambda self: self.free and self.requests)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        """Another request begins with the complete pages of this one."""
        pages = self.requests[data.draw(st.integers(0, len(self.requests) - 1))]
        own = self.free.pop()
        self.users[own] = 1
        for page in pages[:-1]:
            self.users[page] += 1
        self.requests.append([*pages[:-1], own])
        self.filled.append(0)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """At the end, on an abort, retracted or evicted: pages that nobody uses are free."""
        which = data.draw(st.integers(0, len(self.requests) - 1))
        freed = []
        for page in self.requests.pop(which):
            self.users[page] -= 1
            if self.users[page] == 0:
                del self.users[page]
                freed.append(page)
        self.filled.pop(which)
        self.free += freed
        self.written = {at: row for at, row in self.written.items() if at[0] not in freed}
        self.kv.cache.forget(torch.tensor(freed, dtype=torch.int64))

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        """Some pages, for each head others; what was written there, and in that order."""
        pages = st.lists(st.sampled_from(sorted(self.users)), min_size=SLOTS, max_size=SLOTS)
        wanted = torch.tensor([data.draw(pages) for _ in range(HEADS)])[:, None]  # [Hkv, 1, K]
        self.kv.bring(wanted, wanted >= 0)
        # a head's are overwritten by the next one's
        keys = [rows.clone() for rows in self.kv._keys(wanted * PAGE_SIZE, PAGE_SIZE)]
        values = [rows.clone() for rows in self.kv._values(wanted * PAGE_SIZE, PAGE_SIZE)]
        for (page, offset), row in self.written.items():
            for head in range(HEADS):
                for place in (wanted[head, 0] == page).nonzero().flatten().tolist():
                    at = place * PAGE_SIZE + offset
                    assert torch.equal(keys[head][0, at], row[head, :WIDTH])
                    assert torch.equal(values[head][0, at], row[head, WIDTH:])

    @invariant()
    def a_copy_is_its_original(self) -> None:
        cache, host = self.kv.cache, self.kv.host
        head, slot = (cache.page >= 0).nonzero(as_tuple=True)
        page = cache.page[head, slot].long()
        assert torch.equal(cache.key[head, slot], host.key[page, head])
        assert torch.equal(cache.value[head, slot], host.value[page, head])
        # and the two tables are each other's inverse
        assert torch.equal(cache.slot[head, page].long(), slot)
        assert int((cache.slot >= 0).sum()) == len(head)


TestTraffic = Traffic.TestCase
# two thousand operations
TestTraffic.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)


def test_more_than_the_device_has_room_for_is_refused_with_the_number_needed() -> None:
    host = HostPages.empty(PAGES, HEADS, WIDTH, VALUE_WIDTH, torch.float32)
    kv = OffloadedKV(host, PageCache.empty(SLOTS, host, "cpu"), torch.float32)
    wanted = torch.arange(SLOTS + 2).expand(HEADS, 1, -1)
    with pytest.raises(ValueError, match=f"raise offload.device_tokens to {(SLOTS + 2) * 64}"):
        kv.bring(wanted, wanted >= 0)


def test_freed_pages_go_first() -> None:
    host = HostPages.empty(PAGES, HEADS, WIDTH, VALUE_WIDTH, torch.float32)
    kv = OffloadedKV(host, PageCache.empty(SLOTS, host, "cpu"), torch.float32)
    for pages in ([0, 1], [2, 3, 4]):
        wanted = torch.tensor(pages).expand(HEADS, 1, -1)
        kv.bring(wanted, wanted >= 0)
    # in whatever integers the allocator counts pages
    kv.cache.forget(torch.tensor([3], dtype=torch.int32))
    wanted = torch.tensor([5]).expand(HEADS, 1, -1)
    kv.bring(wanted, wanted >= 0)
    held = kv.held(torch.arange(6).expand(HEADS, 1, -1))[0, 0].tolist()
    assert held == [True, True, True, False, True, True], "not what was used longest ago"
    assert kv.cache.counts[Counts.FETCHED] == 6 * HEADS
