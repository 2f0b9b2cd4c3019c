"""How much of a choice is enough for every row of a prefill block, on a GPU (``reference.enough``).

As everywhere in a prefill, logits of rows and pages are not kept: who is better than whom is known,
and what each weighs is weighed anew.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, float32, int32, int64

from hip_kernels.checks import check
from hip_kernels.layout import PAGE_SIZE, QueryBlocks, SparsePlan, Summaries
from hip_kernels.select.best import NO_KEY
from hip_kernels.select.parts import every_page
from hip_kernels.select.prefill import check_weighed
from hip_kernels.select.prefill_tiles import page_logits, tiling
from hip_kernels.tiles import load_rows


def keep_enough(
    query: Tensor,
    summaries: Summaries,
    blocks: QueryBlocks,
    plan: SparsePlan,
    scale: float,
    mass: Tensor,
    chosen: Tensor,
    keys: Tensor,
) -> None:
    """Drop what is chosen beyond ``plan.top_p`` of the mass of every row, best first.

    query [T, Hq, D]; mass [N, Hq, 64] of ``mass``; chosen and keys [N, Hkv, K] of ``best_pages``.
    """
    count, heads, kv_heads = len(blocks), query.shape[1], len(summaries.sigma)
    part = every_page(summaries, blocks)
    check_weighed(query, part, blocks, plan)
    check("mass", mass, (count, heads, PAGE_SIZE), float32)
    check("chosen", chosen, (count, kv_heads, None), int64)
    check("keys", keys, tuple(chosen.shape), int32)
    _enough[(kv_heads, count)](
        *(query, summaries.mean, summaries.sigma),
        *(blocks.tokens, blocks.position, blocks.page, blocks.table, mass),
        *(chosen, keys, torch.zeros_like(keys), float(scale), float(plan.logit_cap)),
        *(float(plan.top_p), plan.sink_pages, plan.window_pages, chosen.shape[2]),
        *(part.stride, summaries.pages),
        GROUP=heads // kv_heads,
        **tiling(summaries, plan),
    )


@triton.jit
def _enough(
    query,
    mean,
    sigma,
    tokens,
    position,
    page,
    table,
    mass,
    chosen,
    keys,
    kept,  # zeros
    scale,
    cap,
    top_p,
    sink,
    window,
    choices,
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
    kv_head = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(0) * GROUP
    own = tl.load(page + block).to(tl.int32)
    chosen += (block * tl.num_programs(0) + kv_head) * choices
    keys += (block * tl.num_programs(0) + kv_head) * choices
    kept += (block * tl.num_programs(0) + kv_head) * choices
    table += block * stride
    PARTS: tl.constexpr = PAGE // ROWS
    for number in range(GROUP * PARTS):
        head = kv_head * GROUP + number // PARTS
        row = number % PARTS * ROWS + tl.arange(0, ROWS)
        token = tl.load(tokens + block * PAGE + row)
        real = tl.load(position + block * PAGE + row) >= 0
        q = load_rows(query, token * heads + head, real, WIDTH, BLOCK).to(tl.float32) * scale
        total = tl.load(mass + (block * heads + head) * PAGE + row)
        held = tl.zeros((ROWS,), tl.float32)
        for start in range(0, sink + window, TILE):
            fixed = start + tl.arange(0, TILE)
            each = tl.where(fixed < sink, fixed, own - window + fixed - sink)
            some = (fixed < sink) | ((each >= sink) & (fixed < sink + window))
            some &= each < own
            place = tl.load(table + each, mask=some, other=0)
            logit = page_logits(
                q, mean, sigma, kv_head, place, some, count, cap,
                PAGE, MEANS, GUARD, CAPS, WIDTH, BLOCK,
            )  # fmt: skip
            held += tl.sum(tl.where(some[None, :], tl.exp(logit - total[:, None]), 0.0), 1)
        for start in range(0, choices, TILE):
            at = start + tl.arange(0, TILE)
            key = tl.load(keys + at, mask=at < choices, other=NO_KEY)
            before = tl.zeros((ROWS, TILE), tl.float32) + held[:, None]
            for others in range(0, choices, TILE):
                other = others + tl.arange(0, TILE)
                each = tl.load(chosen + other, mask=other < choices, other=-1)
                some = each >= 0
                place = tl.load(table + each, mask=some, other=0)
                logit = page_logits(
                    q, mean, sigma, kv_head, place, some, count, cap,
                    PAGE, MEANS, GUARD, CAPS, WIDTH, BLOCK,
                )  # fmt: skip
                share = tl.where(some[None, :], tl.exp(logit - total[:, None]), 0.0)
                rival = tl.load(keys + other, mask=other < choices, other=NO_KEY)
                tie = (rival[:, None] == key[None, :]) & (other[:, None] < at[None, :])
                better = (rival[:, None] > key[None, :]) | tie
                before += tl.sum(tl.where(better[None, :, :], share[:, :, None], 0.0), 1)
            wanting = tl.max(tl.where(real[:, None], top_p - before, float("-inf")), 0) > 0
            wanted = tl.load(kept + at, mask=at < choices, other=0) | wanting.to(tl.int32)
            tl.store(kept + at, wanted, mask=at < choices)
        # the next rows add to it, and all is decided before anything is dropped
        tl.debug_barrier()
    for start in range(0, choices, TILE):
        at = start + tl.arange(0, TILE)
        wanted = tl.load(kept + at, mask=at < choices, other=1) > 0
        tl.store(chosen + at, tl.full((TILE,), -1, tl.int64), mask=(at < choices) & ~wanted)
