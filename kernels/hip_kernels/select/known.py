"""What is known of pages after a second look, on a GPU (``reference.Look.known``)."""

from __future__ import annotations

import triton
import triton.language as tl

from hip_kernels.tiles import log_add


@triton.jit
def know(
    listed,
    true,
    entries,
    chosen,
    budget,
    page_logit,
    parts,
    spread,
    wrong,  # [ROWS]
    rows,
    real,
    columns,
    across,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    SPREAD: tl.constexpr,
    MEANS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """What pages weigh by what was read of them, without sub-pages that are chosen.

    What their parts weigh is overwritten first.
    """
    for start in range(0, entries, TILE):
        entry = start + tl.arange(0, TILE)
        code = tl.load(listed + entry, mask=entry < entries, other=-1)
        read = real[:, None] & (code >= 0)[None, :]
        at = rows[:, None] * columns + (code // MEANS)[None, :]
        part = parts + (code % MEANS * across)[None, :] + at
        more = tl.full((ROWS, TILE), 0, tl.float32)
        if SPREAD:
            more = tl.load(spread + at, mask=read, other=0.0)
        more += tl.log(float(TOKENS))
        found = tl.load(true + rows[:, None] * entries + entry[None, :], mask=read, other=0.0)
        found = tl.minimum(found - more, tl.load(part, mask=read, other=0.0)) - wrong[:, None]
        if PARTS > 1:
            taken = is_among(code, chosen, budget, TILE)
            found = tl.where(taken[None, :], float("-inf"), found)
        tl.store(part, found, mask=read)
    tl.debug_barrier()
    for start in range(0, entries, TILE):
        entry = start + tl.arange(0, TILE)
        code = tl.load(listed + entry, mask=entry < entries, other=-1)
        read = real[:, None] & (code >= 0)[None, :]
        at = rows[:, None] * columns + (code // MEANS)[None, :]
        logit = tl.full((ROWS, TILE), float("-inf"), tl.float32)
        for part in tl.static_range(MEANS):
            more = tl.load(parts + part * across + at, mask=read, other=float("-inf"))
            logit = log_add(logit, more)
        logit += tl.log(float(TOKENS))
        if SPREAD:
            logit += tl.load(spread + at, mask=read, other=0.0)
        # entries of a page store the same
        tl.store(page_logit + at, logit, mask=read)
    tl.debug_barrier()


@triton.jit
def is_among(code, chosen, budget, TILE: tl.constexpr):
    """Which codes [TILE] are chosen."""
    found = code < 0
    for start in range(0, budget, TILE):
        place = start + tl.arange(0, TILE)
        other = tl.load(chosen + place, mask=place < budget, other=-1)
        found |= tl.max((code[:, None] == other[None, :]).to(tl.int32), 1) > 0
    return found
