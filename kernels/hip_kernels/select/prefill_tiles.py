"""How a tile of pages, or of nodes, is weighed for rows of a prefill block, on a GPU."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from hip_kernels.layout import GUARDS, PAGE_SIZE, SparsePlan, Summaries
from hip_kernels.select.triton import part_logits
from hip_kernels.tiles import LEAST_ROWS, load_rows, soft_capped

# pages that one step weighs: of four means each they are one product of 64 columns
TILE = 16


def tiling(summaries: Summaries, plan: SparsePlan, *, values: int = 0) -> dict[str, Any]:
    """What kernels that weigh tiles of pages are compiled for, and so how many ROWS a program has.

    ``values`` is how wide the rows are that they mix by these weights, if they do. Wider heads get
    less at a time, or they spill.
    """
    width = summaries.mean.shape[-1]
    wide, mixes, means = max(width, values) > 128, values > 0, summaries.mean.shape[1]
    return {
        "PAGE": PAGE_SIZE,
        "MEANS": means,
        "GUARD": GUARDS[plan.remainder],
        "CAPS": plan.logit_cap > 0,
        "WIDTH": width,
        "BLOCK": triton.next_power_of_2(width),
        "ROWS": max(LEAST_ROWS, PAGE_SIZE // (4 if mixes else 2)) if wide else PAGE_SIZE,
        # fewer pages are no product with values
        "TILE": TILE // 2 if wide and not mixes else TILE,
        "num_warps": 8,
        # wide values mixed by one mean a page spill with two
        "num_stages": 3 if wide and mixes and means == 1 else 2,
        # left to itself ptxas aims at fewer, and spills
        "maxnreg": 255,
    }


@triton.jit
def page_at(column, listed, end, LISTED: tl.constexpr):
    """The page, or node, of each column: its number, or what is listed there; -1 is none."""
    page = tl.where(column < end, column, -1)
    if LISTED:
        page = tl.load(listed + column, mask=column < end, other=-1).to(tl.int32)
    return page


@triton.jit
def origin_of(top):
    """What to subtract of logits before ``exp``: a row that has seen nothing has no maximum."""
    return tl.where(top > float("-inf"), top, 0.0)


@triton.jit
def rows_of_block(PAGE: tl.constexpr, ROWS: tl.constexpr):
    """Which block a program is of, the longest contexts first, and which rows of it: [ROWS]."""
    PARTS: tl.constexpr = PAGE // ROWS
    # blocks of a chunk are in order
    part = tl.num_programs(1) - 1 - tl.program_id(1)
    return (part // PARTS).to(tl.int64), part % PARTS * ROWS + tl.arange(0, ROWS)


@triton.jit
def page_logits(
    q,
    mean,
    sigma,
    kv_head,
    place,
    seen,
    count,
    cap,
    TOKENS: tl.constexpr,
    MEANS: tl.constexpr,
    GUARD: tl.constexpr,
    CAPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What physical pages ``place`` [TILE] weigh for scaled q [ROWS, BLOCK] -> [ROWS, TILE].

    Of a page that is not ``seen`` nothing is read.
    """
    TILE: tl.constexpr = place.shape[0]
    # the means of a page side by side, so that one product serves all
    part = kv_head * MEANS + tl.arange(0, MEANS)
    rows = tl.reshape(place[:, None] + part[None, :] * count, (TILE * MEANS,))
    some = tl.reshape(tl.broadcast_to(seen[:, None], (TILE, MEANS)), (TILE * MEANS,))
    logit = part_logits(q, mean, rows, some, WIDTH, BLOCK)
    if CAPS:
        logit = soft_capped(logit, cap)
    logit = tl.reshape(logit, (q.shape[0], TILE, MEANS))
    top = tl.max(logit, 2)
    total = tl.sum(tl.exp(logit - top[:, :, None]), 2)
    estimate = top + tl.log(total * (TOKENS // MEANS))
    if GUARD > 0:
        slope = 1.0
        if CAPS:
            slope = 1 - (top / cap) * (top / cap)
        estimate += spread(q, sigma, kv_head * count + place, seen, slope, GUARD, WIDTH, BLOCK)
    return estimate


@triton.jit
def spread(
    q,
    sigma,
    row,
    seen,
    slope,
    GUARD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The second cumulant of the keys about their means, as ``weigh.spread`` has it: [ROWS, TILE].

    As ``triton.guarded``, whose squares in TF32 take more registers than 64 rows leave.
    """
    deviation = load_rows(sigma, row, seen, WIDTH, BLOCK)
    high, height = squared(q, deviation.dtype)
    wide, width = squared(deviation.to(tl.float32), deviation.dtype)
    quadratic = tl.dot(high, tl.trans(wide), input_precision="ieee")
    quadratic *= (0.5 * height)[:, None] * width[None, :] * slope * slope
    if GUARD == 1:
        return quadratic
    linear = tl.abs(q).to(deviation.dtype)
    linear = tl.dot(linear, tl.trans(deviation), input_precision="ieee") * slope
    # 0 where both are 0
    return quadratic * linear / (quadratic + linear + 1.17549435e-38)


@triton.jit
def squared(x, DTYPE: tl.constexpr):
    """Squares of x [ROWS, BLOCK] in a unit for each row, so that they fit float16; the units."""
    unit = tl.max(tl.abs(x), 1)
    x *= (1 / tl.where(unit > 0, unit, 1.0))[:, None]
    return (x * x).to(DTYPE), unit * unit
