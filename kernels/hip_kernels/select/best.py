"""The largest of many numbers, in the order of their places: a radix select by one program.

Four passes over the keys, one for each byte, narrow down to the smallest key that is taken. Of
equal keys the first are taken, so that the same numbers always give the same choice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hip_kernels.checks import check
from hip_kernels.layout import SparsePlan

# a key that is never taken; that of -inf is larger
NO_KEY = tl.constexpr(-(2**31))
_BINS = tl.constexpr(256)
KEYS_A_TILE = 1024


def best_pages(
    score: Tensor, page: Tensor, plan: SparsePlan, listed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The best pages between sink and window of blocks in ``page`` [N].

    score [N, Hkv, P] float32, of page p or of the one that is ``listed`` there, in order and -1 for
    none -> [N, Hkv, budget] logical pages in order, -1 where there are fewer; and their keys,
    int32: a larger one is of a better page.
    """
    return _best(score, page, plan.sink_pages, plan.window_pages, plan.budget_pages, listed=listed)


def best_nodes(score: Tensor, first: int, end: Tensor, wanted: int) -> Tensor:
    """The best nodes from the ``first`` to before the ``end`` [N] of each block.

    score [N, Hkv, J] float32 -> [N, Hkv, wanted] logical nodes in order, -1 where there are fewer.
    """
    return _best(score, end, first, 0, wanted)[0]


def _best(
    score: Tensor, own: Tensor, sink: int, window: int, wanted: int, listed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    blocks, kv_heads, columns = score.shape
    check("score", score, (None, None, None), torch.float32)
    check("page", own, (blocks,), torch.int64)
    if listed is not None:
        check("listed", listed, (blocks, kv_heads, columns), torch.int64)
    keys, taken = (
        torch.empty(blocks, kv_heads, size, dtype=torch.int32, device=score.device)
        for size in (columns, wanted)
    )
    chosen = own.new_empty(blocks, kv_heads, wanted)
    _best_pages[(blocks, kv_heads)](
        *(score, own, listed, keys, chosen, taken, columns, wanted, sink, window),
        LISTED=listed is not None,
        KEYS=KEYS_A_TILE,
        num_warps=4,
    )
    return chosen, taken


@triton.jit
def _best_pages(
    score,
    own_pages,
    listed,
    keys,
    chosen,
    taken,
    columns,
    wanted,
    sink,
    window,
    LISTED: tl.constexpr,
    KEYS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    here = block * tl.num_programs(1) + tl.program_id(1)
    last = tl.load(own_pages + block) - window
    if LISTED:
        listed += here * columns
        end = columns
    else:
        end = tl.minimum(columns, last)
    keys += here * columns
    for start in range(0, end, KEYS):
        column = start + tl.arange(0, KEYS)
        page = column
        if LISTED:
            page = tl.load(listed + column, mask=column < end, other=-1)
        candidate = (page >= sink) & (page < last)
        number = tl.load(score + here * columns + column, mask=column < end, other=0.0)
        tl.store(keys + column, tl.where(candidate, key_of(number), NO_KEY), mask=column < end)
    chosen += here * wanted
    taken += here * wanted
    least, equal = least_taken(keys, end, wanted, KEYS)
    store_taken(keys, end, wanted, least, equal, chosen, taken, KEYS)
    if LISTED:
        for start in range(0, wanted, KEYS):
            at = start + tl.arange(0, KEYS)
            column = tl.load(chosen + at, mask=at < wanted, other=-1)
            page = tl.load(listed + column, mask=column >= 0, other=-1)
            tl.store(chosen + at, page, mask=at < wanted)


@triton.jit
def key_of(number):
    """float32 -> int32, in the same order."""
    bits = number.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.constexpr_function
def _sign(shift):
    """The sign's bit in the byte that is shifted to the end: negative numbers come first."""
    return 128 if shift == 24 else 0


@triton.jit
def least_taken(keys, size, wanted, TILE: tl.constexpr):
    """Of keys [size] the smallest among the ``wanted`` largest, and how many equal to it they hold.

    The program itself has stored the keys: a barrier makes them visible.
    """
    tl.debug_barrier()
    bin_of = tl.arange(0, _BINS)
    least = tl.full((), 0, tl.int32)
    need = tl.full((), 0, tl.int32) + wanted
    for shift in tl.static_range(24, -1, -8):
        bins = tl.zeros((_BINS,), tl.int32)
        for start in range(0, size, TILE):
            place = start + tl.arange(0, TILE)
            key = tl.load(keys + place, mask=place < size, other=NO_KEY)
            counted = key != NO_KEY
            if shift < 24:
                counted &= (key >> (shift + 8)) == (least >> (shift + 8))
            bins += tl.histogram(((key >> shift) & (_BINS - 1)) ^ _sign(shift), _BINS, mask=counted)
        if shift == 24:
            need = tl.minimum(need, tl.sum(bins, 0))
        from_here = tl.sum(bins, 0) - tl.cumsum(bins, 0) + bins
        digit = tl.max(tl.where(from_here >= need, bin_of, 0), 0)
        need -= tl.sum(tl.where(bin_of > digit, bins, 0), 0)
        least |= (digit ^ _sign(shift)) << shift
    return least, need


@triton.jit
def store_taken(keys, size, wanted, least, equal, places, taken_keys, TILE: tl.constexpr):
    """The places of the largest keys, in order, into ``places`` [wanted]; -1 where there are fewer.

    ``taken_keys`` [wanted] become their keys.
    """
    count = tl.full((), 0, tl.int32)
    ties = tl.full((), 0, tl.int32)
    for start in range(0, size, TILE):
        place = start + tl.arange(0, TILE)
        key = tl.load(keys + place, mask=place < size, other=NO_KEY)
        tie = ((key == least) & (key != NO_KEY)).to(tl.int32)
        taken = key > least
        taken |= (tie > 0) & (ties + tl.cumsum(tie, 0) <= equal)
        number = taken.to(tl.int32)
        at = count + tl.cumsum(number, 0) - 1
        tl.store(places + at, place.to(tl.int64), mask=taken)
        tl.store(taken_keys + at, key, mask=taken)
        count += tl.sum(number, 0)
        ties += tl.sum(tie, 0)
    for start in range(0, wanted, TILE):
        at = start + tl.arange(0, TILE)
        rest = (at >= count) & (at < wanted)
        tl.store(places + at, tl.full((TILE,), -1, tl.int64), mask=rest)
        tl.store(taken_keys + at, tl.full((TILE,), NO_KEY, tl.int32), mask=rest)
    tl.debug_barrier()
