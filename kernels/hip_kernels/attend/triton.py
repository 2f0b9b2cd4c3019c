"""Decode attention on a GPU: the exact pages and every other page's summary, in one softmax.

A step's pages are split over programs, each of which leaves a part of the softmax; the last to
arrive merges the parts by their log-sum-exp, in their order. The mathematics is in
``reference.attend_sparse``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hip_kernels.checks import check, check_steps, check_summaries
from hip_kernels.layout import (
    NODE_PAGES,
    PAGE_SIZE,
    DecodeSteps,
    PagedKV,
    SparsePlan,
    Summaries,
)
from hip_kernels.select.choose import Chosen
from hip_kernels.select.nodes import Columns, page_of
from hip_kernels.select.triton import Scores
from hip_kernels.tiles import (
    PAGES_A_TILE,
    arrivals,
    arrives_last,
    load_rows,
    rows_of_group,
    soft_capped,
)

# what one program attends to: exact pages, or tiles of estimated ones
EXACT_A_SPLIT = 4
TILES_A_SPLIT = 4
MOST_SPLITS = 64


def decode(
    query: Tensor,
    kv: PagedKV,
    summaries: Summaries,
    steps: DecodeSteps,
    chosen: Chosen | None,
    scores: Scores | None,
    plan: SparsePlan,
    scale: float,
    out: Tensor,
    estimated: Tensor,
) -> None:
    """Attend one token a request: query [T, Hq, D] -> its row of out [T, Hq, Dv].

    Without ``chosen`` all pages are exact, and without ``scores`` none is estimated; ``estimated``
    [B, Hq] becomes the share of each softmax that went to those that are.
    """
    batch, heads, width = len(steps), *query.shape[1:]
    pages, kv_heads, value_width = steps.table.shape[1], kv.kv_heads, kv.value.shape[2]
    assert heads % kv_heads == 0, f"query has {heads} heads, no multiple of {kv_heads} KV heads"
    check("query", query, (None, None, kv.key.shape[2]))
    check("kv.key", kv.key, (None, kv_heads, width))
    check("kv.value", kv.value, (len(kv.key), kv_heads, value_width))
    check_summaries("summaries", summaries, kv_heads)
    check_steps("steps", steps)
    check("out", out, (len(query), heads, value_width))
    check("estimated", estimated, (batch, heads), torch.float32)
    group, tile = heads // kv_heads, TILES_A_SPLIT * PAGES_A_TILE
    if chosen is None:
        listed, correction = steps.page, estimated  # neither is read
        # a table in as few parts as one program can merge
        budget, count, exact = 0, pages, max(EXACT_A_SPLIT, triton.cdiv(pages, MOST_SPLITS))
    else:
        listed, correction = chosen.pages, chosen.correction
        check("chosen.pages", listed, (batch, kv_heads, None), torch.int64)
        check("chosen.correction", correction, (batch, heads), torch.float32)
        budget, exact = listed.shape[2], EXACT_A_SPLIT
        count = plan.sink_pages + budget + plan.window_pages + 1
    # what is not estimated is not read
    columns, logits, nodes = Columns(0, 0, 0), estimated, None
    if scores is not None:
        scores.check(batch, heads, pages)
        columns, logits, nodes = scores.columns, scores.page, scores.nodes
    node_value, node_table, node_logit, pages_of = (
        summaries.value,
        steps.table,
        estimated,
        steps.page,
    )
    if nodes is not None:
        nodes.check(batch, heads, kv_heads)
        node_value, node_table = nodes.summaries.value, nodes.table
        node_logit, pages_of = nodes.logit, nodes.pages
    node_count = 0 if nodes is None else node_table.shape[1]
    exact_splits, page_splits = triton.cdiv(count, exact), triton.cdiv(len(columns), tile)
    splits = exact_splits + page_splits + triton.cdiv(node_count, tile)
    part = query.new_empty(batch, heads, splits, value_width, dtype=torch.float32)
    mass = query.new_empty(batch, heads, splits, dtype=torch.float32)
    _decode[(splits, batch, kv_heads)](
        *(query, kv.key, kv.value, summaries.value, node_value),
        *(steps.token, steps.position, steps.page, steps.table, node_table, pages_of),
        *(listed, logits, node_logit, correction),
        *(part, mass, out, estimated, arrivals(query.device, batch * kv_heads)),
        *(float(scale * kv.key_scale), float(kv.value_scale), float(plan.logit_cap)),
        *(pages, len(columns), node_count),
        *(count, budget, plan.sink_pages, plan.window_pages),
        *(exact, exact_splits, page_splits, summaries.pages, node_value.shape[1]),
        PAGE=PAGE_SIZE,
        NODE=0 if nodes is None else NODE_PAGES,
        ALL=chosen is None,
        GROUP=group,
        CAPS=plan.logit_cap > 0,
        WIDTH=width,
        VALUE_WIDTH=value_width,
        BLOCK=triton.next_power_of_2(width),
        VALUE_BLOCK=triton.next_power_of_2(value_width),
        ROWS=rows_of_group(group),
        TILES=TILES_A_SPLIT,
        TILE=PAGES_A_TILE,
        SPLITS=triton.next_power_of_2(splits),
        num_warps=4 if max(width, value_width) <= 128 else 8,
        num_stages=2,
        # left alone, the assembler spills to have more programs at once
        maxnreg=255,
    )


@triton.jit
def _decode(
    query,
    key,
    value,
    mean_value,
    node_value,
    token,
    position,
    own_pages,
    table,
    node_table,
    listed_pages,
    chosen,
    logits,
    node_logits,
    correction,
    part,
    mass,
    out,
    estimated,
    counters,
    scale,
    value_scale,
    cap,
    pages,  # of the table
    columns,
    nodes,  # of their table
    exact_count,  # sink, chosen, window, own
    budget,  # columns of ``chosen``
    sink,
    window,
    exact_a_split,
    exact_splits,
    page_splits,
    pool_pages,  # that the summaries have room for
    pool_nodes,
    PAGE: tl.constexpr,
    NODE: tl.constexpr,
    ALL: tl.constexpr,
    GROUP: tl.constexpr,
    CAPS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    split = tl.program_id(0)
    request = tl.program_id(1).to(tl.int64)
    head = tl.program_id(2).to(tl.int64)
    kv_heads = tl.num_programs(2)
    row = tl.arange(0, ROWS)
    real = row < GROUP
    here = (request * kv_heads + head) * GROUP + row  # of a row of [B * Hq]
    own = tl.load(own_pages + request)
    chosen += (request * kv_heads + head) * budget
    v = tl.arange(0, VALUE_BLOCK)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, VALUE_BLOCK), tl.float32)
    if split < exact_splits:
        d = tl.arange(0, BLOCK)
        shown = real[:, None] & (d < WIDTH)[None, :]
        asked = (tl.load(token + request) * kv_heads + head) * GROUP + row
        q = tl.load(query + asked[:, None] * WIDTH + d[None, :], mask=shown, other=0.0)
        last = tl.load(position + request)
        offset = tl.arange(0, PAGE)
        first = split * exact_a_split
        # without a branch inside, so that the next page is read while this one is multiplied
        for column in range(first, tl.minimum(first + exact_a_split, exact_count)):
            if ALL:
                page = tl.where(column <= own, column, -1)
            else:
                page = exact_page(column, chosen, own, budget, sink, window)
            slot = tl.load(table + request * pages + page, mask=page >= 0, other=0) * PAGE + offset
            seen = (page >= 0) & (page * PAGE + offset <= last)
            place = slot * kv_heads + head
            k = load_rows(key, place, seen, WIDTH, BLOCK)
            logit = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale
            if CAPS:
                logit = soft_capped(logit, cap)
            logit = tl.where(seen[None, :], logit, float("-inf"))
            rows = load_rows(value, place, seen, VALUE_WIDTH, VALUE_BLOCK)
            top, total, mixed = more_keys(top, total, mixed, logit, rows.to(q.dtype))
        mixed *= value_scale
    elif split < exact_splits + page_splits:
        wrong = tl.load(correction + here, mask=real, other=0.0)
        listed_pages += (request * kv_heads + head) * columns
        for number in range(TILES):
            column = ((split - exact_splits) * TILES + number) * TILE + tl.arange(0, TILE)
            page = page_of(column, columns, own, listed_pages, NODE)
            pruned = is_pruned(page, chosen, own, budget, sink, window, TILE) & (column < columns)
            shown = real[:, None] & pruned[None, :]
            there = here[:, None] * columns + column[None, :]
            logit = tl.load(logits + there, mask=shown, other=float("-inf")) + wrong[:, None]
            place = tl.load(table + request * pages + page, mask=pruned, other=0)
            place += head * pool_pages
            rows = load_rows(mean_value, place, pruned, VALUE_WIDTH, VALUE_BLOCK)
            top, total, mixed = more_keys(top, total, mixed, logit, rows)
    else:
        wrong = tl.load(correction + here, mask=real, other=0.0)
        for number in range(TILES):
            node = (split - exact_splits - page_splits) * TILES + number
            node = node * TILE + tl.arange(0, TILE)
            shown = real[:, None] & (node < nodes)[None, :]
            there = here[:, None] * nodes + node[None, :]
            logit = tl.load(node_logits + there, mask=shown, other=float("-inf")) + wrong[:, None]
            kept = tl.max(logit, 0) > float("-inf")
            place = tl.load(node_table + request * nodes + node, mask=kept, other=0)
            place += head * pool_nodes
            rows = load_rows(node_value, place, kept, VALUE_WIDTH, VALUE_BLOCK)
            top, total, mixed = more_keys(top, total, mixed, logit, rows)
    at = here * tl.num_programs(0) + split
    tl.store(mass + at, top + tl.log(total), mask=real)
    mixed /= tl.where(total > 0, total, 1.0)[:, None]
    shown = real[:, None] & (v < VALUE_WIDTH)[None, :]
    tl.store(part + at[:, None] * VALUE_WIDTH + v[None, :], mixed, mask=shown)
    if arrives_last(counters + request * kv_heads + head, tl.num_programs(0)):
        for number in range(GROUP):
            _merge(
                part, mass, out, estimated,
                (request * kv_heads + head) * GROUP + number,
                (tl.load(token + request) * kv_heads + head) * GROUP + number,
                tl.num_programs(0), exact_splits, VALUE_WIDTH, VALUE_BLOCK, SPLITS,
            )  # fmt: skip


@triton.jit
def exact_page(column, chosen, own, budget, sink, window):
    """The logical page of an exact column: sink, chosen, window, own; -1 is none."""
    last = own - window + column - sink - budget
    page = tl.where((last >= sink) | (last == own), last, -1)
    is_chosen = (column >= sink) & (column < sink + budget)
    page = tl.where(is_chosen, tl.load(chosen + column - sink, mask=is_chosen, other=-1), page)
    return tl.where(column < sink, tl.where(column < own, column, -1), page)


@triton.jit
def is_pruned(page, chosen, own, budget, sink, window, TILE: tl.constexpr):
    """Which pages [N] lie between sink and window, and are not chosen."""
    pruned = (page >= sink) & (page < own - window)
    for start in range(0, budget, TILE):
        place = start + tl.arange(0, TILE)
        taken = tl.load(chosen + place, mask=place < budget, other=-1)
        pruned &= tl.max((page[:, None] == taken[None, :]).to(tl.int32), 1) == 0
    return pruned


@triton.jit
def more_keys(top, total, mixed, logit, rows):
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
    row,  # of [B * Hq]
    asked,  # of [T * Hq]
    splits,
    exact_splits,
    VALUE_WIDTH: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The parts of a row's softmax, by their log-sum-exp."""
    split = tl.arange(0, SPLITS)
    masses = tl.load(mass + row * splits + split, mask=split < splits, other=float("-inf"))
    weight = tl.exp(masses - tl.max(masses, 0))
    weight /= tl.sum(weight, 0)
    tl.store(estimated + row, tl.sum(tl.where(split >= exact_splits, weight, 0.0), 0))
    v = tl.arange(0, VALUE_BLOCK)
    here = (row * splits + split)[:, None] * VALUE_WIDTH + v[None, :]
    shown = (split < splits)[:, None] & (v < VALUE_WIDTH)[None, :]
    found = tl.sum(weight[:, None] * tl.load(part + here, mask=shown, other=0.0), 0)
    tl.store(out + asked * VALUE_WIDTH + v, found.to(out.dtype.element_ty), mask=v < VALUE_WIDTH)
