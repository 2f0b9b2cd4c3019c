"""Keys and values in host memory, of which the device holds copies of some pages.

Every token is written to host memory at once, and to the copy of its page where there is one. So
a copy never differs from its original, may go at any time, and needs no writing back; a page that
is freed and used again needs no care either. Results cannot depend on what the device holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import torch
from torch import Tensor

from hip_kernels.layout import (
    PAGE_SIZE,
)
from hip_kernels.stored import PagedKV, StoredKV

MissPolicy = Literal["fetch", "estimate"]


@dataclass(frozen=True)
class HostPages:
    """All pages of one layer. One page of one KV head is one piece of memory: keys, then values."""

    rows: Tensor  # [pages, Hkv, 64 * (D + Dv)]
    head_dim: int
    value_dim: int

    @classmethod
    def empty(
        cls, pages: int, kv_heads: int, head_dim: int, value_dim: int, dtype: torch.dtype
    ) -> HostPages:
        """Zeros: what a page holds past its last token is read, and weighs nothing."""
        rows = torch.zeros(pages, kv_heads, PAGE_SIZE * (head_dim + value_dim), dtype=dtype)
        return cls(rows, head_dim, value_dim)

    @property
    def key(self) -> Tensor:
        """[pages, Hkv, 64, D]"""
        return self._as_tokens(self.rows[..., : PAGE_SIZE * self.head_dim])

    @property
    def value(self) -> Tensor:
        """[pages, Hkv, 64, Dv]"""
        return self._as_tokens(self.rows[..., PAGE_SIZE * self.head_dim :])

    @staticmethod
    def _as_tokens(rows: Tensor) -> Tensor:
        return rows.view(*rows.shape[:2], PAGE_SIZE, -1)

    @property
    def bytes_a_page(self) -> int:
        """Of one KV head."""
        return self.rows.shape[2] * self.rows.itemsize


class Counts(IntEnum):
    """What a layer's cache has seen, each page counted once for each KV head."""

    CHOSEN = 0  # pages that searches found
    HELD = 1  # and of these, those that were here
    FETCHED = 2  # pages that were copied here
    ESTIMATED = 3  # chosen ones that were left to the remainder instead
    STALLS = 4  # times that a layer waited for pages


@dataclass(frozen=True)
class PageCache:
    """What of one layer the device holds: each KV head has slots of its own."""

    key: Tensor  # [Hkv, slots, 64, D]
    value: Tensor  # [Hkv, slots, 64, Dv]
    slot: Tensor  # [Hkv, pages] int32: where a page is held; -1 is nowhere
    page: Tensor  # [Hkv, slots] int32: which page a slot holds; -1 is none
    used: Tensor  # [Hkv, slots] int64: the step that wanted it last
    step: Tensor  # [Hkv] int64
    counts: Tensor  # [5] int64: see ``Counts``

    @classmethod
    def empty(cls, slots: int, host: HostPages, device: torch.device | str) -> PageCache:
        pages, heads = host.rows.shape[:2]

        def full(value: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        def rows(width: int) -> Tensor:
            shape = heads, slots, PAGE_SIZE, width
            return torch.zeros(shape, dtype=host.rows.dtype, device=device)

        return cls(
            key=rows(host.head_dim),
            value=rows(host.value_dim),
            slot=full(-1, heads, pages, dtype=torch.int32),
            page=full(-1, heads, slots, dtype=torch.int32),
            used=full(-1, heads, slots),
            step=full(0, heads),
            counts=full(0, len(Counts)),
        )

    @property
    def slots(self) -> int:
        return self.key.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in vars(self).values())

    def forget(self, pages: Tensor) -> None:
        """Pages [C] were freed: their slots are the first to be taken."""
        freed = self.slot.new_zeros(self.slot.shape[1] + 1, dtype=torch.bool)
        freed.index_fill_(0, pages, True)
        # -1, a slot that holds nothing, leads to the last
        self.used.masked_fill_(freed[self.page.long()], -1)


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
        from hip_kernels.resolve.reference import resolve

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

    def _values(self, slots: Tensor) -> Iterator[Tensor]:
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
