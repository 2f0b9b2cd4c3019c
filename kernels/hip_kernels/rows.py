"""Where kernels find keys and values: in a pool of pages, or in the device's copies of some."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hip_kernels.checks import check
from hip_kernels.layout import PAGE_SIZE
from hip_kernels.offloaded import OffloadedKV
from hip_kernels.stored import PagedKV, StoredKV


@dataclass(frozen=True)
class Rows:
    """Keys and values of one layer, one row a token and KV head."""

    key: Tensor  # [pages * 64, Hkv, D]; of copies [Hkv, slots, 64, D]
    value: Tensor
    slot: Tensor  # [Hkv, pages] int32: where the copies are
    held: bool  # whether these are copies

    @classmethod
    def of(cls, kv: StoredKV, width: int) -> Rows:
        """Asserts that the tensors belong together, and to queries of ``width`` channels."""
        heads = kv.kv_heads
        if isinstance(kv, OffloadedKV):
            cache = kv.cache
            value = (heads, cache.slots, PAGE_SIZE, None)
            check("kv.cache.key", cache.key, (heads, None, PAGE_SIZE, width))
            check("kv.cache.value", cache.value, value, cache.key.dtype)
            check("kv.cache.slot", cache.slot, (heads, None), torch.int32)
            key, values = cache.key.view(kv.dtype), cache.value.view(kv.dtype)
            return cls(key, values, cache.slot, True)
        assert isinstance(kv, PagedKV)
        check("kv.key", kv.key, (None, heads, width))
        check("kv.value", kv.value, (len(kv.key), heads, None))
        # not read
        return cls(kv.key, kv.value, kv.key, False)

    @property
    def value_width(self) -> int:
        return self.value.shape[-1]

    @property
    def arguments(self) -> tuple[Tensor, int, int]:
        """Of ``row_of``: where copies are, pages of the pool, slots of a KV head."""
        return self.slot, self.slot.shape[1], self.key.shape[1]


@triton.jit
def row_of(
    page, offset, head, kv_heads, slot, pages, slots, PAGE: tl.constexpr, HELD: tl.constexpr
):
    """The rows of a KV head's tokens at ``offset`` in physical pages; the next is ``apart`` on."""
    if HELD:
        place = tl.load(slot + head * pages + page).to(tl.int64)
        # a page that is nowhere would be another's row, never no row
        return (head * slots + tl.maximum(place, 0)) * PAGE + offset
    return (page * PAGE + offset) * kv_heads + head


@triton.jit
def apart(kv_heads, HELD: tl.constexpr):
    """How many rows lie from a token's to that of the next."""
    if HELD:
        return 1
    return kv_heads
