"""Which pages decode steps attend exactly, on a GPU: by their weight, then by real keys.

The same choice as ``reference.select``, where the mathematics is. ``shortlist`` is the end of the
kernel that weighs (``triton.weigh``); ``look`` is a launch of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hip_kernels.checks import check, check_choice, check_steps
from hip_kernels.layout import GUARDS, NODE_PAGES, PAGE_SIZE, Choice, SparsePlan
from hip_kernels.offloaded import OffloadedKV
from hip_kernels.rows import Rows
from hip_kernels.select.best import KEYS_A_TILE, NO_KEY, key_of, least_taken, store_taken
from hip_kernels.select.enough import keep_enough
from hip_kernels.select.known import know
from hip_kernels.select.nodes import page_of
from hip_kernels.select.scores import Scores
from hip_kernels.steps import DecodeSteps
from hip_kernels.stored import StoredKV
from hip_kernels.tiles import (
    ENTRIES_A_TILE,
    arrivals,
    arrives_last,
    load_rows,
    log_add,
    log_sum_exp,
    rows_of_group,
    soft_capped,
)

# sub-pages that one program reads the keys of
SUB_PAGES_A_SPLIT = 16


@dataclass(frozen=True)
class Shortlist:
    """Scratch for choosing: what is listed for a second look, and the keys that order it."""

    listed: Tensor  # [B, Hkv, E] int64: column * L + part of sub-pages, in order; -1 is none
    keys: Tensor  # [B, Hkv, places] int32
    taken: Tensor  # [B, Hkv, takes] int32
    beam: Tensor  # [B, Hkv, beam] int64: nodes in the beam, in order; -1 is none

    @classmethod
    def of(cls, scores: Scores, kv_heads: int, plan: SparsePlan) -> Shortlist:
        def integers(size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(batch, kv_heads, size, dtype=dtype, device=scores.page.device)

        batch, count, means = len(scores.page), len(scores.columns), len(scores.parts)
        entries = min(plan.second_look * plan.budget_pages, count) * means
        nodes = scores.node.shape[2]
        looks = plan.second_look > 0
        return cls(
            listed=integers(entries, torch.int64),
            keys=integers(max(count * means if looks else count, entries, nodes)),
            # of what is chosen also which are kept
            taken=integers(max(entries, 2 * plan.entries, min(plan.beam, nodes))),
            beam=integers(min(plan.beam, nodes), torch.int64),
        )


def look(
    query: Tensor,
    kv: StoredKV,
    scores: Scores,
    shortlist: Shortlist,
    steps: DecodeSteps,
    choice: Choice,
    plan: SparsePlan,
    scale: float,
) -> None:
    """Choose by real keys into ``choice``: query [T, Hq, D], sub-pages as ``weigh`` listed them.

    Afterwards ``scores.page`` holds what is known of pages that were read, and of those of which
    sub-pages are chosen the rest (``reference.Look.known``). Steps that use their choice again, or
    keep every page, choose nothing.
    """
    batch, heads, width = len(steps), *query.shape[1:]
    kv_heads, means, columns = kv.kv_heads, len(scores.parts), scores.columns
    check("query", query, (None, None, None))
    assert plan.parts in (1, means), f"plan.parts is {plan.parts}; it must be 1 or {means}"
    if isinstance(kv, OffloadedKV):
        assert plan.parts == 1, "what is brought to the device are whole pages"
        # pages that may not be chosen are read where they are
        key, span = kv.host.rows.view(kv.dtype), kv.host.rows.shape[2]
        check("kv.host.rows", key, (None, kv_heads, None))
    else:
        key, span = Rows.of(kv, width).key, 0
    check_steps("steps", steps)
    check_choice("choice", choice, kv_heads, heads)
    scores.check(batch, heads)
    entries = shortlist.listed.shape[2]
    true = torch.empty(batch, heads, entries, dtype=torch.float32, device=query.device)
    splits = triton.cdiv(entries, SUB_PAGES_A_SPLIT)
    group = heads // kv_heads
    _look[(splits, batch, kv_heads)](
        *(query, steps.token, key, steps.table, shortlist.listed, true, scores.total),
        *(scores.page, scores.parts, scores.spread, steps.page, steps.row, steps.reuses),
        *(scores.listed, shortlist.keys, shortlist.taken, choice.entries, choice.correction),
        *(arrivals(query.device, batch * kv_heads), float(scale * kv.key_scale)),
        *(float(plan.logit_cap), float(plan.top_p), steps.sparse_from, steps.far_from),
        *(steps.table.shape[1], len(columns), columns.far, entries),
        *(shortlist.keys.shape[2], shortlist.taken.shape[2], choice.entries.shape[2]),
        *(columns.head, columns.beam, plan.sink_pages, plan.window_pages),
        PAGE=PAGE_SIZE,
        SPAN=span,
        CAPS=plan.logit_cap > 0,
        SPREAD=GUARDS[plan.remainder] > 0,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        SPLIT=SUB_PAGES_A_SPLIT,
        NODE=0 if steps.nodes is None else NODE_PAGES,
        MEANS=means,
        PARTS=plan.parts,
        GROUP=group,
        ROWS=rows_of_group(group),
        TOP_P=plan.top_p < 1,
        TILE=ENTRIES_A_TILE,
        KEYS=KEYS_A_TILE,
        # what spills with four warps
        num_warps=8 if group > 16 else 4,
        # left alone, the assembler spills to have more programs at once
        maxnreg=255,
    )


@triton.jit
def shortlist(
    page_logit,
    parts,
    spread,
    total_out,
    total,  # [ROWS]
    rows,  # [ROWS] of [B * Hq]
    row,
    here,  # of [B * Hkv]
    own,
    far,
    listed_pages,
    correction,  # of the step's own row
    keys,
    chosen,  # entries, or, without a look, pages
    taken,
    columns,  # room
    far_columns,
    across,  # from a part to the next
    wanted,
    head_pages,
    beam_pages,
    sink,
    window,
    top_p,
    LOOKS: tl.constexpr,
    SPREAD: tl.constexpr,
    NODE: tl.constexpr,
    MEANS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TOP_P: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The most promising sub-pages of a step and KV head, or, without a look, its choice."""
    tl.store(total_out + rows, total, mask=row < GROUP)
    # a look will tell
    tl.store(correction + row, tl.zeros((ROWS,), tl.float32), mask=row < GROUP)
    tl.debug_barrier()
    PARTS: tl.constexpr = MEANS if LOOKS else 1
    end = tl.maximum(own - window, 0)
    if NODE > 0:
        end = tl.where(far, far_columns, end)
    for start in range(0, end, KEYS):
        column = start + tl.arange(0, KEYS)
        page = page_of(column, far_columns, own, listed_pages, far, NODE)
        candidate = (page >= sink) & (page < own - window) & (column < end)
        for part in tl.static_range(PARTS):
            best = tl.full((KEYS,), float("-inf"), tl.float32)
            for number in range(GROUP):
                one = here * GROUP + number
                at = one * columns + column
                if LOOKS:
                    share = tl.load(parts + part * across + at, mask=candidate, other=0.0)
                    if SPREAD:
                        share += tl.load(spread + at, mask=candidate, other=0.0)
                else:
                    share = tl.load(page_logit + at, mask=candidate, other=0.0)
                best = tl.maximum(best, share - tl.load(total_out + one))
            key = tl.where(candidate, key_of(best), NO_KEY)
            tl.store(keys + column * PARTS + part, key, mask=column < end)
    least, equal = least_taken(keys, end * PARTS, wanted, KEYS)
    store_taken(keys, end * PARTS, wanted, least, equal, chosen, taken, KEYS)
    if not LOOKS:
        if TOP_P:
            keep_enough(
                chosen, taken, wanted, page_logit, parts, spread, total, rows, row, own, far,
                columns, across, head_pages, beam_pages, sink, window, top_p,
                0, 1, SPREAD, NODE, GROUP, ROWS, TILE,
            )  # fmt: skip
        if NODE > 0:
            to_pages(chosen, wanted, listed_pages, far, 1, TILE)


@triton.jit
def _look(
    query,
    token,
    key,
    table,
    listed,
    true,
    mass,
    page_logit,
    parts,
    spread,
    own_pages,
    kept_rows,
    reuses,
    listed_pages,
    keys,
    taken,
    chosen,
    correction,
    counters,
    scale,
    cap,
    top_p,
    sparse_from,
    nodes_from,
    pages,  # of the table
    columns,  # room
    far_columns,
    entries,  # sub-pages of a list
    places,  # room for keys
    takes,  # room for keys that are taken, and for what is kept of them
    budget,
    head_pages,
    beam_pages,
    sink,
    window,
    PAGE: tl.constexpr,
    SPAN: tl.constexpr,  # numbers of a page of a KV head in host memory; 0: a pool of rows
    CAPS: tl.constexpr,
    SPREAD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    NODE: tl.constexpr,
    MEANS: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TOP_P: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Read the keys of listed sub-pages; the last program to do so chooses by them."""
    request = tl.program_id(1).to(tl.int64)
    head = tl.program_id(2).to(tl.int64)
    kv_heads = tl.num_programs(2)
    here = request * kv_heads + head
    row = tl.arange(0, ROWS)
    rows = here * GROUP + row  # of [B * Hq]
    real = row < GROUP
    own = tl.load(own_pages + request)
    looks = (own >= sparse_from) & (tl.load(reuses + request) == 0)
    far = own >= nodes_from
    listed += here * entries
    listed_pages += here * far_columns
    d = tl.arange(0, BLOCK)
    shown = looks & real[:, None] & (d < WIDTH)[None, :]
    asked = (tl.load(token + request) * kv_heads + head) * GROUP + row
    q = tl.load(query + asked[:, None] * WIDTH + d[None, :], mask=shown, other=0.0)
    TOKENS: tl.constexpr = PAGE // MEANS
    offset = tl.arange(0, PAGE)
    for start in range(0, tl.where(looks, SPLIT, 0), MEANS):
        entry = tl.program_id(0) * SPLIT + start + offset // TOKENS
        code = tl.load(listed + entry, mask=entry < entries, other=-1)
        seen = code >= 0
        page = page_of(code // MEANS, far_columns, own, listed_pages, far, NODE)
        page = tl.load(table + request * pages + page, mask=seen, other=0)
        place = code % MEANS * TOKENS + offset % TOKENS
        if SPAN > 0:
            of_page = key + ((page * kv_heads + head) * SPAN)[:, None]
            k = load_rows(of_page, place, seen, WIDTH, BLOCK)
        else:
            place = (page * PAGE + place) * kv_heads + head
            k = load_rows(key, place, seen, WIDTH, BLOCK)
        logit = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale
        if CAPS:
            logit = soft_capped(logit, cap)
        logit = tl.reshape(logit, (ROWS * MEANS, TOKENS))
        found = tl.reshape(log_sum_exp(logit), (ROWS, MEANS))
        entry = tl.program_id(0) * SPLIT + start + tl.arange(0, MEANS)
        stored = real[:, None] & (entry < entries)[None, :]
        tl.store(true + rows[:, None] * entries + entry[None, :], found, mask=stored)
    if arrives_last(counters + here, tl.num_programs(0)) and looks:
        keys += here * places
        taken += here * takes
        total = tl.load(mass + rows, mask=real, other=0.0)
        across = tl.num_programs(1) * kv_heads * GROUP * columns  # from a part to the next
        excess = tl.zeros((ROWS,), tl.float32)
        count = tl.full((), 0, tl.int32)
        for start in range(0, entries, TILE):
            entry = start + tl.arange(0, TILE)
            code = tl.load(listed + entry, mask=entry < entries, other=-1)
            read = real[:, None] & (code >= 0)[None, :]
            column, part = code // MEANS, code % MEANS
            at = rows[:, None] * columns + column[None, :]
            estimate = tl.load(parts + part[None, :] * across + at, mask=read, other=0.0)
            estimate += tl.log(float(TOKENS))
            if SPREAD:
                estimate += tl.load(spread + at, mask=read, other=0.0)
            share = tl.load(true + rows[:, None] * entries + entry[None, :], mask=read, other=0.0)
            excess += tl.sum(tl.where(read, share - estimate, 0.0), 1)
            count += tl.sum((code >= 0).to(tl.int32), 0)

            share = tl.where(read, share - total[:, None], float("-inf"))
            speaks = code >= 0
            if PARTS == 1:
                # sub-pages of a page stand together, and the first of them speaks for it
                before = tl.load(listed + entry - 1, mask=(entry > 0) & (entry < entries), other=-1)
                speaks &= (before < 0) | (before // MEANS != column)
                for ahead in tl.static_range(1, MEANS):
                    other = entry + ahead
                    code = tl.load(listed + other, mask=other < entries, other=-1)
                    same = real[:, None] & ((code >= 0) & (code // MEANS == column))[None, :]
                    more = true + rows[:, None] * entries + other[None, :]
                    more = tl.load(more, mask=same, other=float("-inf"))
                    share = log_add(share, more - total[:, None])
            best = tl.where(speaks, key_of(tl.max(share, 0)), NO_KEY)
            tl.store(keys + entry, best, mask=entry < entries)
        wrong = tl.minimum(excess / tl.maximum(count, 1).to(tl.float32), 0.0)
        kept_row = tl.load(kept_rows + request) * kv_heads + head
        tl.store(correction + kept_row * GROUP + row, wrong, mask=real)

        chosen += kept_row * budget
        least, equal = least_taken(keys, entries, budget, KEYS)
        store_taken(keys, entries, budget, least, equal, chosen, taken, KEYS)
        for start in range(0, budget, TILE):
            place = start + tl.arange(0, TILE)
            entry = tl.load(chosen + place, mask=place < budget, other=-1)
            code = tl.load(listed + entry, mask=entry >= 0, other=0)
            # other warps load the same
            tl.debug_barrier()
            tl.store(chosen + place, code // (MEANS // PARTS), mask=entry >= 0)
        tl.debug_barrier()
        if TOP_P:
            keep_enough(
                chosen, taken, budget, page_logit, parts, spread, total, rows, row, own, far,
                columns, across, head_pages, beam_pages, sink, window, top_p,
                TOKENS, PARTS, SPREAD, NODE, GROUP, ROWS, TILE // 2,
            )  # fmt: skip
        know(
            listed, true, entries, chosen, budget, page_logit, parts, spread, wrong, rows, real,
            columns, across, TOKENS, PARTS, SPREAD, MEANS, ROWS, TILE,
        )  # fmt: skip
        if NODE > 0:
            to_pages(chosen, budget, listed_pages, far, PARTS, TILE)


@triton.jit
def to_pages(chosen, budget, listed_pages, far, PARTS: tl.constexpr, TILE: tl.constexpr):
    """Columns, in parts, become pages, in parts."""
    for start in range(0, tl.where(far, budget, 0), TILE):
        place = start + tl.arange(0, TILE)
        column = tl.load(chosen + place, mask=place < budget, other=-1)
        there = tl.where(column >= 0, column // PARTS, 0)
        page = tl.load(listed_pages + there, mask=column >= 0, other=-1)
        # other warps load the same
        tl.debug_barrier()
        tl.store(chosen + place, page * PARTS + column % PARTS, mask=column >= 0)
