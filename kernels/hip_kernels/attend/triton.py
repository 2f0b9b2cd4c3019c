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

from hip_kernels.checks import check, check_choice, check_steps, check_summaries
from hip_kernels.layout import NODE_PAGES, PAGE_SIZE, Choice, SparsePlan, Summaries
from hip_kernels.rows import Rows, row_of
from hip_kernels.select.nodes import nodes_end, page_of
from hip_kernels.select.scores import Columns, Scores
from hip_kernels.steps import DecodeSteps
from hip_kernels.stored import StoredKV
from hip_kernels.tiles import (
    PAGES_A_TILE,
    arrivals,
    arrives_last,
    load_rows,
    rows_of_group,
    soft_capped,
)

# exact pages that one program attends to, where it can, and tiles of estimated ones
EXACT_A_SPLIT = 4
TILES_A_SPLIT = 4
# programs that share the pages of a step: one merges what they leave
MOST_SPLITS = 64


def decode(
    query: Tensor,
    kv: StoredKV,
    summaries: Summaries,
    nodes: Summaries | None,
    steps: DecodeSteps,
    choice: Choice | None,
    scores: Scores | None,
    plan: SparsePlan,
    scale: float,
    out: Tensor,
    estimated: Tensor,
) -> None:
    """Attend one token a request: query [T, Hq, D] -> its row of out [T, Hq, Dv].

    Steps that prune attend to their row of ``choice``; without it none may prune, and without
    ``scores`` nothing is estimated. ``estimated`` [B, Hq] becomes the share of each softmax that
    went to what is.
    """
    batch, heads, width = len(steps), *query.shape[1:]
    pages, kv_heads = steps.table.shape[1], kv.kv_heads
    assert heads % kv_heads == 0, f"query has {heads} heads, no multiple of {kv_heads} KV heads"
    check("query", query, (None, None, None))
    stored = Rows.of(kv, width)
    value_width = stored.value_width
    check_summaries("summaries", summaries, kv_heads)
    check_steps("steps", steps)
    check("out", out, (len(query), heads, value_width))
    check("estimated", estimated, (batch, heads), torch.float32)
    group = heads // kv_heads
    chosen, correction, budget, most = steps.page, estimated, 0, pages  # not read
    if choice is not None:
        check_choice("choice", choice, kv_heads, heads)
        chosen, correction = choice.entries, choice.correction
        budget = chosen.shape[2] // plan.parts
        most = plan.sink_pages + budget + plan.window_pages + 1
    # what is not estimated is not read
    columns, logits, node_logits, listed = Columns(0), estimated, estimated, steps.page
    node_value, node_table, count = summaries.value, steps.table, 0
    if scores is not None:
        scores.check(batch, heads)
        columns, logits, listed = scores.columns, scores.page, scores.listed
        if steps.nodes is not None:
            assert nodes is not None, "these steps search through nodes; there are none"
            check_summaries("nodes", nodes, kv_heads)
            node_value, node_table, node_logits = nodes.value, steps.nodes, scores.node
            count = node_table.shape[1]
    tile = TILES_A_SPLIT * PAGES_A_TILE
    page_splits = min(MOST_SPLITS // 2, triton.cdiv(len(columns), tile))
    node_splits = min(MOST_SPLITS // 8, triton.cdiv(count, tile))
    exact_splits = MOST_SPLITS - page_splits - node_splits
    exact_splits = min(exact_splits, triton.cdiv(most, EXACT_A_SPLIT))
    splits = exact_splits + page_splits + node_splits
    part = query.new_empty(batch, heads, splits, value_width, dtype=torch.float32)
    mass = query.new_empty(batch, heads, splits, dtype=torch.float32)
    _decode[(splits, batch, kv_heads)](
        *(query, stored.key, stored.value, *stored.arguments, summaries.value, node_value),
        *(steps.token, steps.position, steps.page, steps.row, steps.table, node_table, listed),
        *(chosen, logits, node_logits, correction),
        *(part, mass, out, estimated, arrivals(query.device, batch * kv_heads)),
        *(float(scale * kv.key_scale), float(kv.value_scale), float(plan.logit_cap)),
        *(steps.sparse_from, steps.far_from, pages, count),
        *(len(columns), columns.far, columns.head),
        *(most, budget, plan.sink_pages, plan.window_pages),
        *(exact_splits, page_splits, node_splits, summaries.pages, node_value.shape[1]),
        PAGE=PAGE_SIZE,
        PARTS=plan.parts,
        HELD=stored.held,
        NODE=0 if count == 0 else NODE_PAGES,
        GROUP=group,
        CAPS=plan.logit_cap > 0,
        WIDTH=width,
        VALUE_WIDTH=value_width,
        BLOCK=triton.next_power_of_2(width),
        VALUE_BLOCK=triton.next_power_of_2(value_width),
        ROWS=rows_of_group(group),
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
    copy_at,
    copy_pages,
    copy_slots,
    mean_value,
    node_value,
    token,
    position,
    own_pages,
    kept_rows,
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
    sparse_from,
    nodes_from,
    pages,  # of the table
    nodes,  # of their table
    columns,  # room
    far_columns,
    head_pages,
    exact_most,  # sink, chosen, window, own
    budget,
    sink,
    window,
    exact_splits,
    page_splits,
    node_splits,
    pool_pages,  # that the summaries have room for
    pool_nodes,
    PAGE: tl.constexpr,
    PARTS: tl.constexpr,  # of a page that an entry of a choice is
    HELD: tl.constexpr,
    NODE: tl.constexpr,
    GROUP: tl.constexpr,
    CAPS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
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
    sparse = own >= sparse_from
    far = sparse & (own >= nodes_from)
    kept_row = tl.load(kept_rows + request) * kv_heads + head
    chosen += kept_row * budget * PARTS
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
        # without a branch inside, so that the next page is read while this one is multiplied
        count = tl.where(sparse, exact_most, own + 1)
        share = tl.cdiv(count, exact_splits)
        for column in range(split * share, tl.minimum((split + 1) * share, count)):
            inside = offset
            if PARTS == 1:
                page = exact_page(column, chosen, own, budget, sink, window)
                page = tl.where(sparse, page, column)
            else:
                page, place = exact_tokens(column, chosen, own, budget, sink, window, PAGE, PARTS)
                page = tl.where(sparse, page, column)
                inside = tl.where(sparse, place, offset)
            found = tl.load(table + request * pages + page, mask=page >= 0, other=0)
            seen = (page >= 0) & (page * PAGE + inside <= last)
            place = row_of(
                found, inside, head, kv_heads, copy_at, copy_pages, copy_slots, PAGE, HELD
            )
            k = load_rows(key, place, seen, WIDTH, BLOCK)
            logit = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale
            if CAPS:
                logit = soft_capped(logit, cap)
            logit = tl.where(seen[None, :], logit, float("-inf"))
            rows = load_rows(value, place, seen, VALUE_WIDTH, VALUE_BLOCK)
            top, total, mixed = more_keys(top, total, mixed, logit, rows.to(q.dtype))
        mixed *= value_scale
    elif split < exact_splits + page_splits:
        wrong = tl.load(correction + kept_row * GROUP + row, mask=real & sparse, other=0.0)
        listed_pages += (request * kv_heads + head) * far_columns
        count = tl.where(far, far_columns, tl.minimum(own, columns))
        count = tl.where(sparse, tl.cdiv(count, TILE), 0)
        share = tl.cdiv(count, page_splits)
        first = (split - exact_splits) * share
        for tile in range(first, tl.minimum(first + share, count)):
            column = tile * TILE + tl.arange(0, TILE)
            page = page_of(column, far_columns, own, listed_pages, far, NODE)
            # a chosen part of a page is not in its logit any more
            taken = budget if PARTS == 1 else 0
            pruned = is_pruned(page, chosen, own, taken, sink, window, TILE) & (column < columns)
            shown = real[:, None] & pruned[None, :]
            there = here[:, None] * columns + column[None, :]
            logit = tl.load(logits + there, mask=shown, other=float("-inf")) + wrong[:, None]
            place = tl.load(table + request * pages + page, mask=pruned, other=0)
            place += head * pool_pages
            rows = load_rows(mean_value, place, pruned, VALUE_WIDTH, VALUE_BLOCK)
            top, total, mixed = more_keys(top, total, mixed, logit, rows)
    elif NODE > 0:
        wrong = tl.load(correction + kept_row * GROUP + row, mask=real & sparse, other=0.0)
        end = tl.minimum(nodes_end(own, head_pages, window, NODE), nodes)
        count = tl.where(far, tl.cdiv(end, TILE), 0)
        share = tl.cdiv(count, node_splits)
        first = (split - exact_splits - page_splits) * share
        for tile in range(first, tl.minimum(first + share, count)):
            node = tile * TILE + tl.arange(0, TILE)
            shown = real[:, None] & (node < end)[None, :]
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
    is_chosen = (column >= sink) & (column < sink + budget)
    page = tl.load(chosen + column - sink, mask=is_chosen, other=-1)
    return tl.where(is_chosen, page, fixed_page(column, own, budget, sink, window))


@triton.jit
def fixed_page(column, own, budget, sink, window):
    """The same where nothing is chosen."""
    last = own - window + column - sink - budget
    page = tl.where((last >= sink) | (last == own), last, -1)
    return tl.where(column < sink, tl.where(column < own, column, -1), page)


@triton.jit
def exact_tokens(
    column, chosen, own, budget, sink, window, PAGE: tl.constexpr, PARTS: tl.constexpr
):
    """The logical pages of an exact column's tokens [PAGE], and where in these they are.

    What is chosen are parts of pages, as many in a column as make a page.
    """
    TOKENS: tl.constexpr = PAGE // PARTS
    offset = tl.arange(0, PAGE)
    is_chosen = (column >= sink) & (column < sink + budget)
    entry = (column - sink) * PARTS + offset // TOKENS
    code = tl.load(chosen + entry, mask=is_chosen & (offset < PAGE), other=-1)
    page = tl.where(code >= 0, code // PARTS, -1)
    page = tl.where(is_chosen, page, fixed_page(column, own, budget, sink, window))
    return page, tl.where(is_chosen, code % PARTS * TOKENS + offset % TOKENS, offset)


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
