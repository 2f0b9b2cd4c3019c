"""What pages weigh, on a GPU: the tile that all kernels share which look at summaries.

The same estimate as ``weigh.page_logits``, where the mathematics is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hip_kernels.checks import check, check_steps, check_summaries
from hip_kernels.layout import PAGE_SIZE, DecodeSteps, SparsePlan, Summaries
from hip_kernels.tiles import PAGES_A_TILE, load_rows, log_sum_exp, rows_of_group, soft_capped

GUARDS = {"none": 0, "mean": 0, "quadratic": 1, "harmonic": 2}


@dataclass(frozen=True)
class Scores:
    """What each page of a request weighs for the heads of one token, -inf where it has none."""

    page: Tensor  # [B, Hq, P] float32: the logit of the page as one key
    parts: Tensor  # [L, B, Hq, P] float32: q . mean of each sub-page
    spread: Tensor  # [B, Hq, P] float32: the guarded second cumulant, written where there is one
    mass: Tensor  # [B, Hq, T] float32: the log-sum-exp of each tile of ``PAGES_A_TILE`` pages

    @classmethod
    def empty(cls, batch: int, heads: int, pages: int, means: int, device: torch.device) -> Scores:
        def of(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        return cls(
            of(batch, heads, pages),
            of(means, batch, heads, pages),
            of(batch, heads, pages),
            of(batch, heads, triton.cdiv(pages, PAGES_A_TILE)),
        )


def score(
    query: Tensor,
    summaries: Summaries,
    steps: DecodeSteps,
    plan: SparsePlan,
    scale: float,
    out: Scores,
) -> None:
    """Weigh the pages before each step's: query [T, Hq, D]."""
    batch, heads, width = len(steps), *query.shape[1:]
    pages, kv_heads = steps.table.shape[1], len(summaries.sigma)
    means = summaries.mean.shape[1]
    assert plan.remainder in GUARDS, f"plan.remainder {plan.remainder} has no kernel: {[*GUARDS]}"
    assert heads % kv_heads == 0, f"query has {heads} heads, no multiple of {kv_heads} KV heads"
    check("query", query, (None, None, summaries.mean.shape[-1]))
    check_steps("steps", steps)
    check_summaries("summaries", summaries, kv_heads)
    check("out.page", out.page, (batch, heads, pages), torch.float32)
    check("out.parts", out.parts, (means, batch, heads, pages), torch.float32)
    check("out.spread", out.spread, (batch, heads, pages), torch.float32)
    tiles = triton.cdiv(pages, PAGES_A_TILE)
    check("out.mass", out.mass, (batch, heads, tiles), torch.float32)
    group = heads // kv_heads
    _score[(tiles, batch, kv_heads)](
        *(query, summaries.mean, summaries.sigma, steps.token, steps.table, steps.page),
        *(out.page, out.parts, out.spread, out.mass),
        *(float(scale), float(plan.logit_cap), pages, summaries.pages),
        PAGE=PAGE_SIZE,
        MEANS=means,
        GROUP=group,
        GUARD=GUARDS[plan.remainder],
        CAPS=plan.logit_cap > 0,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        ROWS=rows_of_group(group),
        TILE=PAGES_A_TILE,
        # a wider head spills with four
        num_warps=4 if width <= 128 else 8,
    )


@triton.jit
def _score(
    query,
    mean,
    sigma,
    token,
    table,
    visible,
    page_out,
    parts_out,
    spread_out,
    mass_out,
    scale,
    cap,
    pages,  # columns of the table
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
    request = tl.program_id(1).to(tl.int64)
    head = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(2) * GROUP
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    seen = column < tl.load(visible + request)
    row = tl.arange(0, ROWS)
    here = request * heads + head * GROUP + row  # of a row of [B * Hq]
    stored = (row < GROUP)[:, None] & (column < pages)[None, :]
    there = here[:, None] * pages + column[None, :]
    d = tl.arange(0, BLOCK)
    real = (row < GROUP)[:, None] & (d < WIDTH)[None, :]
    asked = tl.load(token + request) * heads + head * GROUP + row
    q = tl.load(query + asked[:, None] * WIDTH + d[None, :], mask=real, other=0.0)
    q = q.to(tl.float32) * scale
    place = tl.load(table + request * pages + column, mask=seen, other=0)

    top = tl.full((ROWS, TILE), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, TILE), tl.float32)
    for part in tl.static_range(MEANS):
        logit = part_logits(q, mean, (head * MEANS + part) * count + place, seen, WIDTH, BLOCK)
        if CAPS:
            logit = soft_capped(logit, cap)
        better = tl.maximum(top, logit)
        total = total * tl.exp(top - better) + tl.exp(logit - better)
        top = better
        at = part * tl.num_programs(1) * heads * pages + there
        tl.store(parts_out + at, tl.where(seen[None, :], logit, float("-inf")), mask=stored)
    estimate = top + tl.log(total * (PAGE // MEANS))
    if GUARD > 0:
        slope = 1.0
        if CAPS:
            slope = 1 - (top / cap) * (top / cap)
        more = guarded(q, sigma, head * count + place, seen, slope, GUARD, WIDTH, BLOCK)
        estimate += more
        tl.store(spread_out + there, tl.where(seen[None, :], more, float("-inf")), mask=stored)
    estimate = tl.where(seen[None, :], estimate, float("-inf"))
    tl.store(page_out + there, estimate, mask=stored)
    at = here * tl.num_programs(0) + tl.program_id(0)
    tl.store(mass_out + at, log_sum_exp(estimate), mask=row < GROUP)


@triton.jit
def part_logits(q, mean, row, seen, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """q [ROWS, BLOCK] times rows [TILE] of the means -> [ROWS, TILE] in float32."""
    keys = load_rows(mean, row, seen, WIDTH, BLOCK)
    return tl.dot(q.to(keys.dtype), tl.trans(keys), input_precision="ieee")


@triton.jit
def guarded(
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

    Squares leave the range of float16: they are multiplied as TF32 where sigma is half.
    """
    deviation = load_rows(sigma, row, seen, WIDTH, BLOCK)
    wide = deviation.to(tl.float32)
    precision: tl.constexpr = "ieee" if deviation.dtype == tl.float32 else "tf32"
    quadratic = tl.dot(0.5 * q * q, tl.trans(wide * wide), input_precision=precision)
    quadratic *= slope * slope
    if GUARD == 1:
        return quadratic
    linear = tl.abs(q).to(deviation.dtype)
    linear = tl.dot(linear, tl.trans(deviation), input_precision="ieee") * slope
    # 0 where both are 0
    return quadratic * linear / (quadratic + linear + 1.17549435e-38)
