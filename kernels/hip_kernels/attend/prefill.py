"""Prefill attention on a GPU: blocks of 64 rows, exact pages and every other page's summary.

One softmax a row over both: the first kernel attends to the exact pages, the second adds the
others to what it finds. The mathematics is in ``reference.attend_sparse``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor, float32, int64

from hip_kernels.attend.triton import exact_page, more_keys
from hip_kernels.checks import check
from hip_kernels.layout import PAGE_SIZE, QueryBlocks, SparsePlan
from hip_kernels.offloaded import OffloadedKV
from hip_kernels.resolve.triton import bring
from hip_kernels.rows import Rows, apart, row_of
from hip_kernels.select.parts import Part
from hip_kernels.select.prefill import check_blocks, check_weighed
from hip_kernels.select.prefill_tiles import origin_of, page_at, page_logits, rows_of_block, tiling
from hip_kernels.steps import NO_PAGE
from hip_kernels.stored import StoredKV
from hip_kernels.tiles import load_rows, log_add, soft_capped

# keys that one step takes; half as many of wider heads, which spill
KEYS = 32


def attend(
    query: Tensor,
    kv: StoredKV,
    parts: Sequence[Part],
    blocks: QueryBlocks,
    chosen: Tensor,
    plan: SparsePlan,
    scale: float,
    out: Tensor,
    estimated: Tensor,
) -> None:
    """Attend to sink, chosen, window and own pages, and to the summaries of all others.

    query [T, Hq, D]; parts as ``mass`` weighs them; chosen [N, Hkv, K] logical pages between sink
    and window, -1 is padding; out [T, Hq, Dv], of which the rows of the blocks are written.
    ``estimated`` [N, Hq, 64] becomes the share of each row's softmax that went to summaries.
    """
    count, heads, kv_heads = len(blocks), query.shape[1], kv.kv_heads
    value_width = out.shape[2]
    check("out", out, (len(query), heads, None))
    check("chosen", chosen, (count, kv_heads, None), int64)
    check("estimated", estimated, (count, heads, PAGE_SIZE), float32)
    exact = torch.empty_like(estimated)
    _attend_exactly(query, kv, blocks, chosen, plan, scale, plan.logit_cap, out, exact)
    if plan.remainder == "none":
        estimated.zero_()
        return
    for number, part in enumerate(parts):
        of, choices, fixed = part.summaries, chosen.shape[2], (plan.sink_pages, plan.window_pages)
        if part.pages > 1:
            # no node is left that reaches into sink or window, or holds a chosen page
            choices, fixed = 0, (0, 0)
        check_weighed(query, part, blocks, plan)
        check("summaries.sigma", of.sigma, (kv_heads, None, query.shape[2]))
        check("summaries.value", of.value, (kv_heads, None, value_width))
        shape = tiling(of, plan, values=value_width)
        _rest[(heads, count * PAGE_SIZE // shape["ROWS"])](
            *(query, *of.tensors, blocks.tokens, blocks.position, blocks.page),
            *(part.table, part.listed, chosen, out, exact, estimated),
            *(float(scale), float(plan.logit_cap), *fixed, choices),
            *(part.columns, part.stride, of.pages),
            FIRST=number == 0,
            LAST=number == len(parts) - 1,
            LISTED=part.listed is not None,
            TOKENS=part.tokens,
            GROUP=heads // kv_heads,
            CHOICES=triton.next_power_of_2(max(choices, 1)),
            VALUE_WIDTH=value_width,
            VALUE_BLOCK=triton.next_power_of_2(value_width),
            **shape,
        )


def attend_all(
    query: Tensor, kv: StoredKV, blocks: QueryBlocks, scale: float, cap: float, out: Tensor
) -> None:
    """Attend to every page up to the block's own: query [T, Hq, D] -> rows of out [T, Hq, Dv]."""
    check("query", query, (None, None, None))
    assert query.shape[1] % kv.kv_heads == 0, (
        f"query has {query.shape[1]} heads, no multiple of {kv.kv_heads} KV heads"
    )
    check_blocks("blocks", blocks)
    check("out", out, (len(query), query.shape[1], None))
    _attend_exactly(query, kv, blocks, None, SparsePlan(), scale, cap, out, None)


def _attend_exactly(
    query: Tensor,
    kv: StoredKV,
    blocks: QueryBlocks,
    chosen: Tensor | None,
    plan: SparsePlan,
    scale: float,
    cap: float,
    out: Tensor,
    mass: Tensor | None,
) -> None:
    """``mass`` [N, Hq, 64] becomes each row's log-sum-exp; all pages where nothing is chosen."""
    heads, width = query.shape[1:]
    stored = Rows.of(kv, width)
    value_width = stored.value_width
    check("out", out, (len(query), heads, value_width))
    choices = 0 if chosen is None else chosen.shape[2]
    for part in _waves(kv, blocks, chosen, plan):
        shared = len(blocks.table) == 1
        table = blocks.table if shared else blocks.table[part]
        page, some = blocks.page[part], None if chosen is None else chosen[part]
        if isinstance(kv, OffloadedKV):
            row = torch.arange(len(page), device=page.device)
            fresh = torch.zeros_like(row, dtype=torch.int32)
            bring(kv, table, page, some, row, fresh, plan, NO_PAGE if some is None else 0, False)
        _exact[(heads, len(page))](
            *(query, stored.key, stored.value, *stored.arguments),
            *(blocks.tokens[part], blocks.position[part], page, table, some, out),
            None if mass is None else mass[part],
            *(float(scale * kv.key_scale), float(kv.value_scale), float(cap)),
            *(plan.sink_pages, plan.window_pages, choices),
            0 if shared else table.shape[1],
            ALL=chosen is None,
            HELD=stored.held,
            PAGE=PAGE_SIZE,
            GROUP=heads // kv.kv_heads,
            CAPS=cap > 0,
            WIDTH=width,
            VALUE_WIDTH=value_width,
            BLOCK=triton.next_power_of_2(width),
            VALUE_BLOCK=triton.next_power_of_2(value_width),
            KEYS=min(PAGE_SIZE, KEYS if max(width, value_width) <= 128 else KEYS // 2),
            num_warps=4 if max(width, value_width) <= 128 else 8,
            num_stages=2,
            maxnreg=255,
        )


def _waves(
    kv: StoredKV, blocks: QueryBlocks, chosen: Tensor | None, plan: SparsePlan
) -> Iterator[slice]:
    """Blocks whose pages fit the device together."""
    most = blocks.table.shape[1]
    if chosen is not None:
        most = plan.sink_pages + chosen.shape[2] + plan.window_pages + 1
    size = kv.steps_at_once(most)
    if chosen is None and len(blocks.table) == 1:
        # they share all of their pages
        size = len(blocks)
    for start in range(0, len(blocks), size):
        yield slice(start, start + size)


@triton.jit
def _exact(
    query,
    key,
    value,
    copy_at,
    copy_pages,
    copy_slots,
    tokens,
    position,
    page,
    table,
    chosen,
    out,
    mass,
    scale,
    value_scale,
    cap,
    sink,
    window,
    choices,  # columns of ``chosen``
    stride,  # between the tables of two blocks
    ALL: tl.constexpr,
    HELD: tl.constexpr,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    CAPS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    # the longest contexts first: blocks of a chunk are in order
    block = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)
    heads = tl.num_programs(0)
    kv_head = head // GROUP
    kv_heads = heads // GROUP
    row = tl.arange(0, PAGE)
    token = tl.load(tokens + block * PAGE + row)
    at = tl.load(position + block * PAGE + row).to(tl.int32)
    real = at >= 0
    own = tl.load(page + block).to(tl.int32)
    # a padding row sees its block's first key, so that its softmax is finite
    at = tl.where(real, at, own * PAGE)
    last = tl.max(at, 0)
    q = load_rows(query, token * heads + head, real, WIDTH, BLOCK)
    top = tl.full((PAGE,), float("-inf"), tl.float32)
    total = tl.zeros((PAGE,), tl.float32)
    mixed = tl.zeros((PAGE, VALUE_BLOCK), tl.float32)
    offset = tl.arange(0, KEYS)
    runs: tl.constexpr = PAGE // KEYS
    if ALL:
        count = own + 1
    else:
        count = sink + choices + window + 1
        listed = chosen + (block * kv_heads + kv_head) * choices
    for step in range(count * runs):
        number = step // runs
        if ALL:
            each = number
        else:
            each = exact_page(number, listed, own, choices, sink, window).to(tl.int32)
        start = step % runs * KEYS
        k_at = each * PAGE + start + offset
        seen = (each >= 0) & (k_at <= last)
        found = tl.load(table + block * stride + each, mask=each >= 0, other=0)
        first = row_of(found, start, kv_head, kv_heads, copy_at, copy_pages, copy_slots, PAGE, HELD)
        k = load_rows(key + first * WIDTH, offset * apart(kv_heads, HELD), seen, WIDTH, BLOCK)
        logit = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale
        if CAPS:
            logit = soft_capped(logit, cap)
        logit = tl.where(seen[None, :] & (k_at[None, :] <= at[:, None]), logit, float("-inf"))
        rows, next_row = value + first * VALUE_WIDTH, offset * apart(kv_heads, HELD)
        rows = load_rows(rows, next_row, seen, VALUE_WIDTH, VALUE_BLOCK)
        top, total, mixed = more_keys(top, total, mixed, logit, rows.to(q.dtype))
    if not ALL:
        tl.store(mass + (block * heads + head) * PAGE + row, top + tl.log(total))
    mixed *= (value_scale / total)[:, None]
    v = tl.arange(0, VALUE_BLOCK)
    here = (token * heads + head)[:, None] * VALUE_WIDTH + v[None, :]
    stored = real[:, None] & (v < VALUE_WIDTH)[None, :]
    tl.store(out + here, mixed.to(out.dtype.element_ty), mask=stored)


@triton.jit
def _rest(
    query,
    mean,
    sigma,
    value,
    tokens,
    position,
    page,
    table,
    listed,
    chosen,
    out,
    exact,  # each row's log-sum-exp over exact keys
    estimated,  # that over summaries, and in the end its share
    scale,
    cap,
    sink,
    window,
    choices,  # columns of ``chosen``
    columns,  # of the table, or of ``listed``
    stride,  # between the tables of two blocks
    count,  # pages that the summaries have room for
    FIRST: tl.constexpr,  # of the parts
    LAST: tl.constexpr,
    LISTED: tl.constexpr,
    TOKENS: tl.constexpr,  # of a page, or a node
    PAGE: tl.constexpr,
    MEANS: tl.constexpr,
    GROUP: tl.constexpr,
    GUARD: tl.constexpr,
    CAPS: tl.constexpr,
    CHOICES: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    block, row = rows_of_block(PAGE, ROWS)
    heads = tl.num_programs(0)
    kv_head = head // GROUP
    token = tl.load(tokens + block * PAGE + row)
    own = tl.load(page + block).to(tl.int32)
    here = block * (heads // GROUP) + kv_head
    q = load_rows(query, token * heads + head, row >= 0, WIDTH, BLOCK).to(tl.float32) * scale
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((VALUE_BLOCK, ROWS), tl.float32)
    index = tl.arange(0, CHOICES)
    taken = tl.load(chosen + here * choices + index, mask=index < choices, other=-1).to(tl.int32)
    first = sink
    end = own - window
    if LISTED:
        listed += here * columns
        first = 0
        end = columns
    # wide heads with a cap spill where all that a loop does not change is kept
    for start in tl.range(first, end, TILE, disable_licm=CAPS and BLOCK > 128):
        column = page_at(start + tl.arange(0, TILE), listed, end, LISTED)
        is_taken = tl.max((column[:, None] == taken[None, :]).to(tl.int32), 1)
        some = (column >= sink) & (column < own - window) & (is_taken == 0)
        place = tl.load(table + block * stride + column, mask=some, other=0)
        logit = page_logits(
            q, mean, sigma, kv_head, place, some, count, cap,
            TOKENS, MEANS, GUARD, CAPS, WIDTH, BLOCK,
        )  # fmt: skip
        logit = tl.where(some[None, :], logit, float("-inf"))
        rows = load_rows(value, kv_head * count + place, some, VALUE_WIDTH, VALUE_BLOCK)
        better = tl.maximum(top, tl.max(logit, 1))
        origin = origin_of(better)
        kept = tl.exp(top - origin)
        weight = tl.exp(logit - origin[:, None])
        total = total * kept + tl.sum(weight, 1)
        mixed *= kept[None, :]
        weight = tl.trans(weight.to(rows.dtype))
        mixed = tl.dot(tl.trans(rows), weight, mixed, input_precision="ieee")
        top = better
    at = (block * heads + head) * PAGE + row
    real = tl.load(position + block * PAGE + row) >= 0
    before = tl.load(exact + at)
    mass = top + tl.log(total)
    more = mass
    if not FIRST:
        so_far = tl.load(estimated + at)
        before = log_add(before, so_far)
        more = log_add(mass, so_far)
    # of both, where either may be nothing
    share = tl.sigmoid(mass - before)
    if LAST:
        more = tl.where(real, tl.sigmoid(more - tl.load(exact + at)), 0.0)
    tl.store(estimated + at, more)
    v = tl.arange(0, VALUE_BLOCK)
    here = (token * heads + head)[:, None] * VALUE_WIDTH + v[None, :]
    stored = real[:, None] & (v < VALUE_WIDTH)[None, :]
    found = tl.load(out + here, mask=stored, other=0.0).to(tl.float32) * (1 - share)[:, None]
    found += tl.trans(mixed * (share / tl.where(total > 0, total, 1.0))[None, :])
    tl.store(out + here, found.to(out.dtype.element_ty), mask=stored)
