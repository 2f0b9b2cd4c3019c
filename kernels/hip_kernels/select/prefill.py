"""What pages weigh for the 64 rows of prefill blocks, on a GPU.

Logits of rows and pages are too many to keep: each pass weighs a tile of pages anew. The same
estimate as ``weigh.page_logits``, where the mathematics is.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor, float32, int64

from hip_kernels.checks import check, check_summaries
from hip_kernels.layout import GUARDS, PAGE_SIZE, QueryBlocks, SparsePlan, Summaries
from hip_kernels.select.triton import part_logits
from hip_kernels.tiles import load_rows, soft_capped

# pages that one step weighs: of four means each they are one product of 64 columns
TILE = 16


def mass(
    query: Tensor,
    summaries: Summaries,
    blocks: QueryBlocks,
    plan: SparsePlan,
    scale: float,
    out: Tensor,
) -> None:
    """Each row's log-sum-exp over the pages before its block; -inf where there is none.

    query [T, Hq, D]; out [N, Hq, 64] float32.
    """
    count, heads = len(blocks), query.shape[1]
    check_weighed(query, summaries, blocks, plan)
    check("out", out, (count, heads, PAGE_SIZE), float32)
    group, shape = heads // len(summaries.sigma), tiling(summaries, plan)
    _mass[(heads, count * PAGE_SIZE // shape["ROWS"])](
        *(query, summaries.mean, summaries.sigma),
        *(blocks.tokens, blocks.page, blocks.table, out),
        *(float(scale), float(plan.logit_cap), table_stride(blocks), summaries.pages),
        GROUP=group,
        **shape,
    )


def score(
    query: Tensor,
    summaries: Summaries,
    blocks: QueryBlocks,
    plan: SparsePlan,
    scale: float,
    mass: Tensor,
    out: Tensor,
) -> None:
    """The largest share, as a logarithm, of each page in the softmax of a row of a block.

    query [T, Hq, D]; mass [N, Hq, 64] of ``mass``; out [N, Hkv, P] float32, the maximum over the
    rows of a block and the heads of a group; -inf where a page is not before the block.
    """
    count, heads, kv_heads = len(blocks), query.shape[1], len(summaries.sigma)
    pages = blocks.table.shape[1]
    check_weighed(query, summaries, blocks, plan)
    check("mass", mass, (count, heads, PAGE_SIZE), float32)
    check("out", out, (count, kv_heads, pages), float32)
    group, shape = heads // kv_heads, tiling(summaries, plan)
    _best[(triton.cdiv(pages, shape["TILE"]), kv_heads, count)](
        *(query, summaries.mean, summaries.sigma),
        *(blocks.tokens, blocks.position, blocks.page, blocks.table, mass, out),
        *(float(scale), float(plan.logit_cap), pages, table_stride(blocks), summaries.pages),
        GROUP=group,
        **shape,
    )


def check_weighed(
    query: Tensor, summaries: Summaries, blocks: QueryBlocks, plan: SparsePlan
) -> None:
    """Assert what all kernels ask that weigh the pages before blocks."""
    heads, kv_heads = query.shape[1], len(summaries.sigma)
    assert plan.remainder in GUARDS, f"plan.remainder {plan.remainder} has no kernel: {[*GUARDS]}"
    assert heads % kv_heads == 0, f"query has {heads} heads, no multiple of {kv_heads} KV heads"
    check("query", query, (None, None, summaries.mean.shape[-1]))
    check_summaries("summaries", summaries, kv_heads)
    check_blocks("blocks", blocks)


def check_blocks(name: str, of: QueryBlocks) -> None:
    """Assert that these are blocks of prefill."""
    count = len(of)
    check(f"{name}.tokens", of.tokens, (count, PAGE_SIZE), int64)
    check(f"{name}.position", of.position, (count, PAGE_SIZE), int64)
    check(f"{name}.page", of.page, (count,), int64)
    check(f"{name}.table", of.table, (count if len(of.table) > 1 else 1, None), int64)


def table_stride(blocks: QueryBlocks) -> int:
    """How far apart the tables of two blocks are; 0 where they share one."""
    return blocks.table.shape[1] if len(blocks.table) > 1 else 0


def tiling(summaries: Summaries, plan: SparsePlan, *, values: int = 0) -> dict[str, Any]:
    """What kernels that weigh tiles of pages are compiled for, and so how many ROWS a program has.

    ``values`` is how wide the rows are that they mix by these weights, if they do. Wider heads get
    less at a time, or they spill.
    """
    width = summaries.mean.shape[-1]
    wide, mixes = max(width, values) > 128, values > 0
    return {
        "PAGE": PAGE_SIZE,
        "MEANS": summaries.mean.shape[1],
        "GUARD": GUARDS[plan.remainder],
        "CAPS": plan.logit_cap > 0,
        "WIDTH": width,
        "BLOCK": triton.next_power_of_2(width),
        "ROWS": PAGE_SIZE // (4 if mixes else 2) if wide else PAGE_SIZE,
        # fewer pages are no product with values
        "TILE": TILE // 2 if wide and not mixes else TILE,
        "num_warps": 8,
        "num_stages": 3 if wide and mixes else 2,
        # left to itself ptxas aims at fewer, and spills
        "maxnreg": 255,
    }


@triton.jit
def _mass(
    query,
    mean,
    sigma,
    tokens,
    page,
    table,
    out,
    scale,
    cap,
    stride,  # between the tables of two blocks
    count,  # pages that the summaries have room for
    PAGE: tl.constexpr,
    MEANS: tl.constexpr,
    GROUP: tl.constexpr,
    GUARD: tl.constexpr,
    CAPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    block, row = rows_of_block(PAGE, ROWS)
    heads = tl.num_programs(0)
    token = tl.load(tokens + block * PAGE + row)
    q = load_rows(query, token * heads + head, row >= 0, WIDTH, BLOCK).to(tl.float32) * scale
    own = tl.load(page + block).to(tl.int32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, own, TILE):
        column = start + tl.arange(0, TILE)
        seen = column < own
        place = tl.load(table + block * stride + column, mask=seen, other=0)
        logit = page_logits(
            q, mean, sigma, head // GROUP, place, seen, count, cap,
            PAGE, MEANS, GUARD, CAPS, WIDTH, BLOCK,
        )  # fmt: skip
        logit = tl.where(seen[None, :], logit, float("-inf"))
        better = tl.maximum(top, tl.max(logit, 1))
        total = total * tl.exp(top - better) + tl.sum(tl.exp(logit - better[:, None]), 1)
        top = better
    tl.store(out + (block * heads + head) * PAGE + row, top + tl.log(total))


@triton.jit
def _best(
    query,
    mean,
    sigma,
    tokens,
    position,
    page,
    table,
    mass,
    out,
    scale,
    cap,
    pages,  # columns of the table
    stride,  # between the tables of two blocks
    count,  # pages that the summaries have room for
    PAGE: tl.constexpr,
    MEANS: tl.constexpr,
    GROUP: tl.constexpr,
    GUARD: tl.constexpr,
    CAPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    kv_head = tl.program_id(1).to(tl.int64)
    block = tl.program_id(2).to(tl.int64)
    kv_heads = tl.num_programs(1)
    heads = kv_heads * GROUP
    start = tl.program_id(0) * TILE
    column = start + tl.arange(0, TILE)
    own = tl.load(page + block).to(tl.int32)
    best = tl.full((TILE,), float("-inf"), tl.float32)
    if start < own:
        seen = column < own
        place = tl.load(table + block * stride + column, mask=seen, other=0)
        PARTS: tl.constexpr = PAGE // ROWS
        for number in range(GROUP * PARTS):
            head = kv_head * GROUP + number // PARTS
            row = number % PARTS * ROWS + tl.arange(0, ROWS)
            token = tl.load(tokens + block * PAGE + row)
            real = tl.load(position + block * PAGE + row) >= 0
            q = load_rows(query, token * heads + head, real, WIDTH, BLOCK).to(tl.float32) * scale
            logit = page_logits(
                q, mean, sigma, kv_head, place, seen, count, cap,
                PAGE, MEANS, GUARD, CAPS, WIDTH, BLOCK,
            )  # fmt: skip
            rest = tl.load(mass + (block * heads + head) * PAGE + row)
            share = tl.where(real[:, None] & seen[None, :], logit - rest[:, None], float("-inf"))
            best = tl.maximum(best, tl.max(share, 0))
    tl.store(out + (block * kv_heads + kv_head) * pages + column, best, mask=column < pages)


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
    PAGE: tl.constexpr,
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
    estimate = top + tl.log(total * (PAGE // MEANS))
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
