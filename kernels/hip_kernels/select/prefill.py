"""What pages weigh for the 64 rows of prefill blocks, on a GPU.

Logits of rows and pages are too many to keep: each pass weighs a tile of pages anew. The same
estimate as ``weigh.page_logits``, where the mathematics is.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor, float32, int64

from hip_kernels.checks import check
from hip_kernels.layout import GUARDS, PAGE_SIZE, QueryBlocks, SparsePlan
from hip_kernels.select.parts import Part
from hip_kernels.select.prefill_tiles import origin_of, page_at, page_logits, rows_of_block, tiling
from hip_kernels.tiles import load_rows, log_add


def mass(
    query: Tensor,
    parts: Sequence[Part],
    blocks: QueryBlocks,
    plan: SparsePlan,
    scale: float,
    out: Tensor,
) -> None:
    """Each row's log-sum-exp over all parts; -inf where there is nothing.

    query [T, Hq, D]; out [N, Hq, 64] float32.
    """
    count, heads = len(blocks), query.shape[1]
    for number, part in enumerate(parts):
        check_weighed(query, part, blocks, plan)
        check("out", out, (count, heads, PAGE_SIZE), float32)
        shape = tiling(part.summaries, plan)
        _mass[(heads, count * PAGE_SIZE // shape["ROWS"])](
            *(query, part.summaries.mean, part.summaries.sigma),
            *(blocks.tokens, blocks.page, part.table, part.listed, out),
            *(float(scale), float(plan.logit_cap)),
            *(part.columns, part.stride, part.summaries.pages),
            MORE=number > 0,
            LISTED=part.listed is not None,
            TOKENS=part.tokens,
            GROUP=heads // len(part.summaries.sigma),
            **shape,
        )


def score(
    query: Tensor,
    part: Part,
    blocks: QueryBlocks,
    plan: SparsePlan,
    scale: float,
    mass: Tensor,
    out: Tensor,
) -> None:
    """The largest share, as a logarithm, of each page or node in the softmax of a row of a block.

    query [T, Hq, D]; mass [N, Hq, 64] of ``mass``; out [N, Hkv, C] float32, the maximum over the
    rows of a block and the heads of a group; -inf of what is not listed, or not before the block.
    """
    count, heads, kv_heads = len(blocks), query.shape[1], len(part.summaries.sigma)
    check_weighed(query, part, blocks, plan)
    check("mass", mass, (count, heads, PAGE_SIZE), float32)
    check("out", out, (count, kv_heads, part.columns), float32)
    shape = tiling(part.summaries, plan)
    _best[(triton.cdiv(part.columns, shape["TILE"]), kv_heads, count)](
        *(query, part.summaries.mean, part.summaries.sigma),
        *(blocks.tokens, blocks.position, blocks.page, part.table, part.listed, mass, out),
        *(float(scale), float(plan.logit_cap)),
        *(part.columns, part.stride, part.summaries.pages),
        LISTED=part.listed is not None,
        TOKENS=part.tokens,
        GROUP=heads // kv_heads,
        **shape,
    )


def check_weighed(query: Tensor, part: Part, blocks: QueryBlocks, plan: SparsePlan) -> None:
    """Assert what all kernels ask that weigh what is before blocks."""
    heads, kv_heads = query.shape[1], len(part.summaries.sigma)
    assert plan.remainder in GUARDS, f"plan.remainder {plan.remainder} has no kernel: {[*GUARDS]}"
    assert heads % kv_heads == 0, f"query has {heads} heads, no multiple of {kv_heads} KV heads"
    check("query", query, (None, None, part.summaries.mean.shape[-1]))
    check_blocks("blocks", blocks)
    part.check(len(blocks), kv_heads)


def check_blocks(name: str, of: QueryBlocks) -> None:
    """Assert that these are blocks of prefill."""
    count = len(of)
    check(f"{name}.tokens", of.tokens, (count, PAGE_SIZE), int64)
    check(f"{name}.position", of.position, (count, PAGE_SIZE), int64)
    check(f"{name}.page", of.page, (count,), int64)
    check(f"{name}.table", of.table, (count if len(of.table) > 1 else 1, None), int64)


@triton.jit
def _mass(
    query,
    mean,
    sigma,
    tokens,
    page,
    table,
    listed,
    out,
    scale,
    cap,
    columns,  # of the table, or of ``listed``
    stride,  # between the tables of two blocks
    count,  # pages that the summaries have room for
    MORE: tl.constexpr,  # than what ``out`` has already
    LISTED: tl.constexpr,
    TOKENS: tl.constexpr,  # of a page, or a node
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
    if LISTED:
        listed += (block * (heads // GROUP) + head // GROUP) * columns
        end = columns
    else:
        end = tl.load(page + block).to(tl.int32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, end, TILE):
        each = page_at(start + tl.arange(0, TILE), listed, end, LISTED)
        seen = each >= 0
        place = tl.load(table + block * stride + each, mask=seen, other=0)
        logit = page_logits(
            q, mean, sigma, head // GROUP, place, seen, count, cap,
            TOKENS, MEANS, GUARD, CAPS, WIDTH, BLOCK,
        )  # fmt: skip
        logit = tl.where(seen[None, :], logit, float("-inf"))
        better = tl.maximum(top, tl.max(logit, 1))
        origin = origin_of(better)
        total = total * tl.exp(top - origin) + tl.sum(tl.exp(logit - origin[:, None]), 1)
        top = better
    out += (block * heads + head) * PAGE + row
    found = top + tl.log(total)
    if MORE:
        found = log_add(found, tl.load(out))
    tl.store(out, found)


@triton.jit
def _best(
    query,
    mean,
    sigma,
    tokens,
    position,
    page,
    table,
    listed,
    mass,
    out,
    scale,
    cap,
    columns,  # of the table, or of ``listed``
    stride,  # between the tables of two blocks
    count,  # pages that the summaries have room for
    LISTED: tl.constexpr,
    TOKENS: tl.constexpr,  # of a page, or a node
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
    if LISTED:
        listed += (block * kv_heads + kv_head) * columns
        end = columns
    else:
        end = tl.load(page + block).to(tl.int32)
    best = tl.full((TILE,), float("-inf"), tl.float32)
    if start < end:
        each = page_at(column, listed, end, LISTED)
        seen = each >= 0
        place = tl.load(table + block * stride + each, mask=seen, other=0)
        PARTS: tl.constexpr = PAGE // ROWS
        for number in range(GROUP * PARTS):
            head = kv_head * GROUP + number // PARTS
            row = number % PARTS * ROWS + tl.arange(0, ROWS)
            token = tl.load(tokens + block * PAGE + row)
            real = tl.load(position + block * PAGE + row) >= 0
            q = load_rows(query, token * heads + head, real, WIDTH, BLOCK).to(tl.float32) * scale
            logit = page_logits(
                q, mean, sigma, kv_head, place, seen, count, cap,
                TOKENS, MEANS, GUARD, CAPS, WIDTH, BLOCK,
            )  # fmt: skip
            rest = tl.load(mass + (block * heads + head) * PAGE + row)
            share = tl.where(real[:, None] & seen[None, :], logit - rest[:, None], float("-inf"))
            best = tl.maximum(best, tl.max(share, 0))
    tl.store(out + (block * kv_heads + kv_head) * columns + column, best, mask=column < columns)
