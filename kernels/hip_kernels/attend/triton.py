"""Decode attention on a GPU: the exact pages and every other page's summary, in one softmax.

A step's pages are split over programs, each of which leaves a part of the softmax; a second kernel
merges the parts by their log-sum-exp. The mathematics is in ``reference.attend_sparse``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hip_kernels.checks import check, check_summaries
from hip_kernels.layout import PAGE_SIZE, PagedKV, Summaries
from hip_kernels.tiles import PAGES_A_TILE, load_rows, rows_of_group, soft_capped

# what one program attends to: exact pages, or tiles of estimated ones
EXACT_A_SPLIT = 4
TILES_A_SPLIT = 4


@dataclass(frozen=True)
class DecodeStep:
    """What decode steps [B] attend to."""

    table: Tensor  # [B, P] physical pages in logical order
    lengths: Tensor  # [B] tokens, the new one included
    exact: Tensor  # [B, Hkv, K] logical pages attended exactly; -1 is padding
    rest: Tensor  # [B, Hq, P] float32 logits of all other pages, each as one key; -inf is none


def decode(
    query: Tensor,
    kv: PagedKV,
    summaries: Summaries,
    step: DecodeStep,
    scale: float,
    cap: float,
    out: Tensor,
    estimated: Tensor,
) -> None:
    """Attend one new token a request: query [B, Hq, D] -> out [B, Hq, Dv].

    ``estimated`` [B, Hq] becomes the share of each softmax that went to estimated pages.
    """
    batch, heads, width = query.shape
    pages, kv_heads, value_width = step.table.shape[1], kv.kv_heads, kv.value.shape[2]
    assert heads % kv_heads == 0, f"query has {heads} heads, no multiple of {kv_heads} KV heads"
    check("query", query, (None, None, kv.key.shape[2]))
    check("kv.key", kv.key, (None, kv_heads, width))
    check("kv.value", kv.value, (len(kv.key), kv_heads, value_width))
    check_summaries("summaries", summaries, kv_heads)
    check("step.table", step.table, (batch, pages), torch.int64)
    check("step.lengths", step.lengths, (batch,), torch.int64)
    check("step.exact", step.exact, (batch, kv_heads, None), torch.int64)
    check("step.rest", step.rest, (batch, heads, pages), torch.float32)
    check("out", out, (batch, heads, value_width))
    check("estimated", estimated, (batch, heads), torch.float32)
    group, count = heads // kv_heads, step.exact.shape[2]
    exact_splits = triton.cdiv(count, EXACT_A_SPLIT)
    splits = exact_splits + triton.cdiv(pages, TILES_A_SPLIT * PAGES_A_TILE)
    part = query.new_empty(batch, heads, splits, value_width, dtype=torch.float32)
    mass = query.new_empty(batch, heads, splits, dtype=torch.float32)
    block = triton.next_power_of_2(max(width, value_width))
    _decode[(splits, batch, kv_heads)](
        *(query, kv.key, kv.value, summaries.value, step.table, step.lengths),
        *(step.exact, step.rest, part, mass),
        *(float(scale * kv.key_scale), float(kv.value_scale), float(cap)),
        *(pages, count, exact_splits, summaries.pages),
        PAGE=PAGE_SIZE,
        GROUP=group,
        CAPS=cap > 0,
        WIDTH=width,
        VALUE_WIDTH=value_width,
        BLOCK=triton.next_power_of_2(width),
        VALUE_BLOCK=triton.next_power_of_2(value_width),
        ROWS=rows_of_group(group),
        EXACT=EXACT_A_SPLIT,
        TILES=TILES_A_SPLIT,
        TILE=PAGES_A_TILE,
        num_warps=4 if block <= 128 else 8,
        # three spill, and pages are too few to fill them
        num_stages=2,
    )
    _merge[(batch * heads,)](
        *(part, mass, out, estimated, splits, exact_splits),
        VALUE_WIDTH=value_width,
        VALUE_BLOCK=triton.next_power_of_2(value_width),
        SPLITS=triton.next_power_of_2(splits),
        num_warps=4,
    )


@triton.jit
def _decode(
    query,
    key,
    value,
    mean_value,
    table,
    lengths,
    exact,
    rest,
    part,
    mass,
    scale,
    value_scale,
    cap,
    pages,  # columns of the table
    exact_count,  # columns of ``exact``
    exact_splits,
    pool_pages,  # pages that the summaries have room for
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    CAPS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    EXACT: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    split = tl.program_id(0)
    request = tl.program_id(1).to(tl.int64)
    head = tl.program_id(2).to(tl.int64)
    kv_heads = tl.num_programs(2)
    row = tl.arange(0, ROWS)
    real = row < GROUP
    here = (request * kv_heads + head) * GROUP + row  # of a row of [B * Hq]
    v = tl.arange(0, VALUE_BLOCK)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, VALUE_BLOCK), tl.float32)
    if split < exact_splits:
        d = tl.arange(0, BLOCK)
        shown = real[:, None] & (d < WIDTH)[None, :]
        q = tl.load(query + here[:, None] * WIDTH + d[None, :], mask=shown, other=0.0)
        length = tl.load(lengths + request)
        offset = tl.arange(0, PAGE)
        for number in range(EXACT):
            column = split * EXACT + number
            listed = exact + (request * kv_heads + head) * exact_count + column
            page = tl.load(listed, mask=column < exact_count, other=-1)
            if page >= 0:
                slot = tl.load(table + request * pages + page) * PAGE + offset
                seen = page * PAGE + offset < length
                place = slot * kv_heads + head
                k = load_rows(key, place, seen, WIDTH, BLOCK)
                logit = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale
                if CAPS:
                    logit = soft_capped(logit, cap)
                logit = tl.where(seen[None, :], logit, float("-inf"))
                rows = load_rows(value, place, seen, VALUE_WIDTH, VALUE_BLOCK)
                top, total, mixed = _more(top, total, mixed, logit, rows.to(q.dtype))
        mixed *= value_scale
    else:
        for number in range(TILES):
            column = ((split - exact_splits) * TILES + number) * TILE + tl.arange(0, TILE)
            there = here[:, None] * pages + column[None, :]
            shown = real[:, None] & (column < pages)[None, :]
            logit = tl.load(rest + there, mask=shown, other=float("-inf"))
            some = tl.max(logit, 0) > float("-inf")
            place = tl.load(table + request * pages + column, mask=some, other=0)
            place += head * pool_pages
            rows = load_rows(mean_value, place, some, VALUE_WIDTH, VALUE_BLOCK)
            top, total, mixed = _more(top, total, mixed, logit, rows)
    at = here * tl.num_programs(0) + split
    tl.store(mass + at, top + tl.log(total), mask=real)
    mixed /= tl.where(total > 0, total, 1.0)[:, None]
    shown = real[:, None] & (v < VALUE_WIDTH)[None, :]
    tl.store(part + at[:, None] * VALUE_WIDTH + v[None, :], mixed, mask=shown)


@triton.jit
def _more(top, total, mixed, logit, rows):
    """Take keys of ``logit`` [ROWS, N] and values ``rows`` [N, VALUE_BLOCK] into the softmax."""
    better = tl.maximum(top, tl.max(logit, 1))
    # a row that has seen nothing yet has no maximum to subtract
    origin = tl.where(better > float("-inf"), better, 0.0)
    kept = tl.exp(top - origin)
    weight = tl.exp(logit - origin[:, None])
    total = total * kept + tl.sum(weight, 1)
    mixed = mixed * kept[:, None]
    mixed += tl.dot(weight.to(rows.dtype), rows, input_precision="ieee")
    return better, total, mixed


@triton.jit
def _merge(
    part,
    mass,
    out,
    estimated,
    splits,
    exact_splits,
    VALUE_WIDTH: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    masses = tl.load(mass + row * splits + split, mask=split < splits, other=float("-inf"))
    weight = tl.exp(masses - tl.max(masses, 0))
    weight /= tl.sum(weight, 0)
    tl.store(estimated + row, tl.sum(tl.where(split >= exact_splits, weight, 0.0), 0))
    v = tl.arange(0, VALUE_BLOCK)
    found = tl.zeros((VALUE_BLOCK,), tl.float32)
    for number in range(splits):
        share = tl.sum(tl.where(split == number, weight, 0.0), 0)
        here = (row * splits + number) * VALUE_WIDTH + v
        found += share * tl.load(part + here, mask=v < VALUE_WIDTH, other=0.0)
    tl.store(out + row * VALUE_WIDTH + v, found.to(out.dtype.element_ty), mask=v < VALUE_WIDTH)
