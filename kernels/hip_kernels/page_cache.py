"""Pages in host memory, and which of them the device holds copies of."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from hip_kernels.layout import PAGE_SIZE


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
    STALLS = 4  # times that a KV head of the layer waited for pages


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
        freed.index_fill_(0, pages.long(), True)
        # -1, a slot that holds nothing, leads to the last
        self.used.masked_fill_(freed[self.page.long()], -1)

    def drop(self, pages: Tensor) -> None:
        """Pages [C] were written in host memory alone: what is held of them is of before."""
        pages = pages.long()
        slot = self.slot[:, pages].long()
        head, at = (slot >= 0).nonzero(as_tuple=True)
        emptied = head, slot[head, at]
        self.page[emptied] = -1
        self.used[emptied] = -1
        self.slot[:, pages] = -1
