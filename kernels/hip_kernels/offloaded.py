"""Keys and values in host memory, of which the device holds copies of some pages.

Every token is written to host memory at once, and to the copy of its page where there is one. So
a copy never differs from its original, may go at any time, and needs no writing back; a page that
is freed and used again needs no care either. Results cannot depend on what the device holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hip_kernels.layout import PAGE_SIZE
from hip_kernels.page_cache import Counts, HostPages, PageCache
from hip_kernels.resolve.reference import resolve
from hip_kernels.stored import PagedKV, StoredKV

MissPolicy = Literal["fetch", "estimate"]


@dataclass(frozen=True)
class OffloadedKV(StoredKV):
    """Keys and values of one layer, read through a ``PageCache``."""

    host: HostPages
    cache: PageCache
    dtype: torch.dtype  # of a key; what is stored may have another name for the same bits
    miss_policy: MissPolicy = "fetch"
    key_scale: float = 1.0
    value_scale: float = 1.0

    @property
    def kv_heads(self) -> int:
        return self.host.rows.shape[1]

    def write(self, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Tokens at slots [T] of the pool: key [T, Hkv, D], value [T, Hkv, Dv], as stored."""
        if key.is_cuda:
            from hip_kernels.resolve import triton

            triton.write(self, slots, key.contiguous(), value.contiguous())
            return
        page, offset = slots // PAGE_SIZE, slots % PAGE_SIZE
        self.host.key[page, :, offset] = key
        self.host.value[page, :, offset] = value
        copy = self.cache.slot[:, page].long()  # [Hkv, T]
        head, token = (copy >= 0).nonzero(as_tuple=True)
        at = head, copy[head, token], offset[token]
        self.cache.key[at] = key[token, head]
        self.cache.value[at] = value[token, head]

    def steps_at_once(self, pages: int) -> int:
        return max(1, self.cache.slots // pages)

    def held(self, physical: Tensor) -> Tensor:
        return self._slots_of(physical) >= 0

    def offer(self, chosen: Tensor, physical: Tensor, *, fresh: bool, waits: bool) -> Tensor:
        real = chosen >= 0
        held = real & self.held(physical)
        counts = self.cache.counts
        if fresh:
            counts[Counts.CHOSEN] += real.sum()
            counts[Counts.HELD] += held.sum()
        if waits or self.miss_policy == "fetch":
            return chosen
        counts[Counts.ESTIMATED] += (real & ~held).sum()
        # a later step will find them here
        self.bring(physical, real)
        return chosen.where(held, -1)

    def bring(self, physical: Tensor, real: Tensor) -> None:
        resolve(self.host, self.cache, physical.where(real, -1).flatten(1))

    def together(self, pages: Tensor) -> PagedKV:
        wanted = pages.expand(self.kv_heads, -1)
        self.bring(wanted, wanted >= 0)
        slot = self._slots_of(wanted)
        head = torch.arange(self.kv_heads, device=slot.device)[:, None]

        def rows(held: Tensor) -> Tensor:  # [P * 64, Hkv, D]
            found = held[head, slot].view(self.dtype).flatten(1, 2)
            return found.transpose(0, 1).contiguous()

        scales = self.key_scale, self.value_scale
        return PagedKV(rows(self.cache.key), rows(self.cache.value), *scales)

    def whole(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        def stored(rows: Tensor) -> Tensor:
            # a sum over other strides is a sum in another order
            return rows[pages].view(self.dtype).transpose(1, 2).contiguous()

        return stored(self.host.key), stored(self.host.value)

    def _keys(self, slots: Tensor, tokens: int) -> Iterator[Tensor]:
        if tokens < PAGE_SIZE:
            return self._each_run(slots, tokens)
        return self._each_head(self.cache.key, slots)

    def _values(self, slots: Tensor, tokens: int) -> Iterator[Tensor]:
        assert tokens == PAGE_SIZE, "of pages that are brought, the whole is read"
        return self._each_head(self.cache.value, slots)

    def _each_head(self, held: Tensor, slots: Tensor) -> Iterator[Tensor]:
        """Whole pages at slots [Hkv, N, K] of the pool, which are held."""
        found = self._slots_of(slots // PAGE_SIZE).flatten(1)
        gathered = held.new_empty(found.shape[1], *held.shape[2:])
        for rows, at in zip(held, found, strict=True):
            # padding is read, whatever is there, and weighs nothing
            torch.index_select(rows, 0, at.clamp(min=0), out=gathered)
            yield gathered.view(self.dtype).view(slots.shape[1], -1, held.shape[3]).float()

    def _each_run(self, slots: Tensor, tokens: int) -> Iterator[Tensor]:
        """Runs of ``tokens`` keys from slots [Hkv, N, K], straight from host memory."""
        shape = self.host.key.shape
        keys = self.host.key.view(*shape[:2], -1, tokens, shape[3])
        for head, at in enumerate(slots.flatten(1)):
            found = keys[at // PAGE_SIZE, head, at % PAGE_SIZE // tokens]
            yield found.view(self.dtype).view(slots.shape[1], -1, keys.shape[-1]).float()

    def _slots_of(self, physical: Tensor) -> Tensor:
        """Where pages [Hkv, ...] are held; -1 is nowhere."""
        flat = physical.flatten(1).clamp(min=0)
        return self.cache.slot.gather(1, flat).long().view(physical.shape)
