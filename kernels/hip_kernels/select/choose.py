"""Which pages decode steps attend exactly, on a GPU: by their weight, then by real keys.

The same choice as ``reference.select``, where the mathematics is. Nothing here waits for the GPU,
and nothing but shapes decides what is launched.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hip_kernels.checks import check, check_steps
from hip_kernels.layout import NODE_PAGES, PAGE_SIZE, DecodeSteps, PagedKV, SparsePlan
from hip_kernels.select.best import KEYS_A_TILE, NO_KEY, key_of, least_taken, store_taken
from hip_kernels.select.enough import keep_enough
from hip_kernels.select.nodes import page_of
from hip_kernels.select.triton import GUARDS, Scores
from hip_kernels.tiles import (
    arrivals,
    arrives_last,
    load_rows,
    log_add,
    log_sum_exp,
    mass_of,
    rows_of_group,
    soft_capped,
)

# sub-pages that one program reads the keys of
SUB_PAGES_A_SPLIT = 16
_ENTRIES_A_TILE = 64


@dataclass(frozen=True)
class Chosen:
    """What decode steps [B] attend exactly, between sink and window."""

    pages: Tensor  # [B, Hkv, K] int64 logical; -1 is padding
    correction: Tensor  # [B, Hq] float32: to be added to the logits of estimated pages


def choose(
    query: Tensor,
    kv: PagedKV,
    scores: Scores,
    steps: DecodeSteps,
    plan: SparsePlan,
    scale: float,
) -> Chosen:
    """Choose ``plan.budget_pages`` for each step and KV head.

    query [T, Hq, D]; scores as ``triton.score`` left them.
    """
    batch, heads, width = len(steps), *query.shape[1:]
    pages, kv_heads, means = steps.table.shape[1], kv.kv_heads, len(scores.parts)
    check("query", query, (None, None, kv.key.shape[2]))
    check("kv.key", kv.key, (None, kv_heads, width))
    check_steps("steps", steps)
    scores.check(batch, heads, pages)
    assert plan.budget_pages > 0, "plan.budget_pages is 0; a step chooses one page or more"
    budget, columns, nodes = plan.budget_pages, scores.columns, scores.nodes
    looks, count = plan.second_look > 0, len(columns)
    listed = min(plan.second_look * budget, count) * means if looks else budget
    places = max(count * means, listed) if looks else count

    def integers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=query.device)

    chosen = integers(batch, kv_heads, budget, dtype=torch.int64)
    correction = torch.empty(batch, heads, dtype=torch.float32, device=query.device)
    mass = torch.empty_like(correction)
    keys = integers(batch, kv_heads, places)
    taken = integers(batch, kv_heads, max(listed, 2 * budget))
    list_ = integers(batch, kv_heads, listed, dtype=torch.int64) if looks else chosen
    group = heads // kv_heads
    # without nodes a column is a page
    pages_of = steps.table if nodes is None else nodes.pages
    shape = columns.head, columns.beam, plan.sink_pages, plan.window_pages
    how = {
        "NODE": 0 if nodes is None else NODE_PAGES,
        "MEANS": means,
        "GROUP": group,
        "ROWS": rows_of_group(group),
        "TOP_P": plan.top_p < 1,
        "TILE": _ENTRIES_A_TILE,
        "KEYS": KEYS_A_TILE,
        "num_warps": 4,
    }
    _shortlist[(batch, kv_heads)](
        *(scores.page, scores.parts, scores.spread, scores.mass, steps.page, pages_of, mass),
        *(correction, keys, list_, taken),
        *(count, scores.mass.shape[2], listed, places, taken.shape[2], *shape, float(plan.top_p)),
        LOOKS=looks,
        SPREAD=GUARDS[plan.remainder] > 0,
        **how,
    )
    if not looks:
        return Chosen(chosen, correction)
    true = torch.empty(batch, heads, listed, dtype=torch.float32, device=query.device)
    splits = triton.cdiv(listed, SUB_PAGES_A_SPLIT)
    _look[(splits, batch, kv_heads)](
        *(query, steps.token, kv.key, steps.table, list_, true, mass),
        *(scores.page, scores.parts, scores.spread, steps.page, pages_of),
        *(keys, taken, chosen, correction, arrivals(query.device, batch * kv_heads)),
        *(float(scale * kv.key_scale), float(plan.logit_cap), float(plan.top_p)),
        *(pages, count, listed, places, taken.shape[2], budget, *shape),
        PAGE=PAGE_SIZE,
        CAPS=plan.logit_cap > 0,
        SPREAD=GUARDS[plan.remainder] > 0,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        SPLIT=SUB_PAGES_A_SPLIT,
        **how,
    )
    return Chosen(chosen, correction)


@triton.jit
def _shortlist(
    page_logit,
    parts,
    spread,
    tile_mass,
    own_pages,
    listed_pages,
    mass,
    correction,
    keys,
    listed,
    taken,
    columns,
    tiles,  # of columns, whose masses are known
    wanted,
    places,  # room for keys
    takes,  # room for keys that are taken, and for what is kept of them
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
    """The most promising sub-pages of a request and KV head, or, without a look, pages."""
    request = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1) * GROUP
    here = request * tl.num_programs(1) + head
    own = tl.load(own_pages + request)
    row = tl.arange(0, ROWS)
    rows = here * GROUP + row  # of [B * Hq]
    total = mass_of(tile_mass + rows * tiles, row < GROUP, tiles, ROWS, TILE)
    tl.store(mass + rows, total, mask=row < GROUP)
    # a look will tell
    tl.store(correction + rows, tl.zeros((ROWS,), tl.float32), mask=row < GROUP)
    tl.debug_barrier()

    PARTS: tl.constexpr = MEANS if LOOKS else 1
    keys += here * places
    if NODE > 0:
        listed_pages += here * columns
        end = columns
    else:
        end = tl.minimum(columns, tl.maximum(own - window, 0))
    for start in range(0, end, KEYS):
        column = start + tl.arange(0, KEYS)
        page = page_of(column, columns, own, listed_pages, NODE)
        candidate = (page >= sink) & (page < own - window) & (column < end)
        for part in tl.static_range(PARTS):
            best = tl.full((KEYS,), float("-inf"), tl.float32)
            for number in range(GROUP):
                one = here * GROUP + number
                at = one * columns + column
                if LOOKS:
                    across = part * tl.num_programs(0) * heads * columns
                    share = tl.load(parts + across + at, mask=candidate, other=0.0)
                    if SPREAD:
                        share += tl.load(spread + at, mask=candidate, other=0.0)
                else:
                    share = tl.load(page_logit + at, mask=candidate, other=0.0)
                best = tl.maximum(best, share - tl.load(mass + one))
            key = tl.where(candidate, key_of(best), NO_KEY)
            tl.store(keys + column * PARTS + part, key, mask=column < end)
    listed += here * wanted
    taken += here * takes
    least, equal = least_taken(keys, end * PARTS, wanted, KEYS)
    store_taken(keys, end * PARTS, wanted, least, equal, listed, taken, KEYS)
    if not LOOKS:
        if TOP_P:
            keep_enough(
                listed, taken, wanted, page_logit, mass, rows, row, own, columns,
                head_pages, beam_pages, sink, window, top_p, NODE, GROUP, ROWS, TILE,
            )  # fmt: skip
        if NODE > 0:
            _to_pages(listed, wanted, listed_pages, TILE)


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
    listed_pages,
    keys,
    taken,
    chosen,
    correction,
    counters,
    scale,
    cap,
    top_p,
    pages,  # of the table
    columns,
    entries,  # sub-pages of a list
    places,  # room for keys
    takes,  # room for keys that are taken, and for what is kept of them
    budget,
    head_pages,
    beam_pages,
    sink,
    window,
    PAGE: tl.constexpr,
    CAPS: tl.constexpr,
    SPREAD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    NODE: tl.constexpr,
    MEANS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TOP_P: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Read the keys of listed sub-pages; the last program to do so picks pages by them."""
    request = tl.program_id(1).to(tl.int64)
    head = tl.program_id(2).to(tl.int64)
    kv_heads = tl.num_programs(2)
    here = request * kv_heads + head
    row = tl.arange(0, ROWS)
    rows = here * GROUP + row  # of [B * Hq]
    real = row < GROUP
    listed += here * entries
    d = tl.arange(0, BLOCK)
    shown = real[:, None] & (d < WIDTH)[None, :]
    asked = (tl.load(token + request) * kv_heads + head) * GROUP + row
    q = tl.load(query + asked[:, None] * WIDTH + d[None, :], mask=shown, other=0.0)
    own = tl.load(own_pages + request)
    if NODE > 0:
        listed_pages += here * columns
    TOKENS: tl.constexpr = PAGE // MEANS
    offset = tl.arange(0, PAGE)
    for start in range(0, SPLIT, MEANS):
        entry = tl.program_id(0) * SPLIT + start + offset // TOKENS
        code = tl.load(listed + entry, mask=entry < entries, other=-1)
        seen = code >= 0
        page = page_of(code // MEANS, columns, own, listed_pages, NODE)
        page = tl.load(table + request * pages + page, mask=seen, other=0)
        slot = page * PAGE + code % MEANS * TOKENS + offset % TOKENS
        k = load_rows(key, slot * kv_heads + head, seen, WIDTH, BLOCK)
        logit = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale
        if CAPS:
            logit = soft_capped(logit, cap)
        logit = tl.reshape(logit, (ROWS * MEANS, TOKENS))
        found = tl.reshape(log_sum_exp(logit), (ROWS, MEANS))
        entry = tl.program_id(0) * SPLIT + start + tl.arange(0, MEANS)
        stored = real[:, None] & (entry < entries)[None, :]
        tl.store(true + rows[:, None] * entries + entry[None, :], found, mask=stored)
    if not arrives_last(counters + here, tl.num_programs(0)):
        return

    keys += here * places
    taken += here * takes
    across = tl.num_programs(1) * kv_heads * GROUP * columns  # from a part to the next
    total = tl.load(mass + rows, mask=real, other=0.0)
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

        # sub-pages of a page stand together, and the first of them speaks for it
        before = tl.load(listed + entry - 1, mask=(entry > 0) & (entry < entries), other=-1)
        first = (code >= 0) & ((before < 0) | (before // MEANS != column))
        share = tl.where(read, share - total[:, None], float("-inf"))
        for ahead in tl.static_range(1, MEANS):
            other = entry + ahead
            code = tl.load(listed + other, mask=other < entries, other=-1)
            same = real[:, None] & ((code >= 0) & (code // MEANS == column))[None, :]
            more = tl.load(true + rows[:, None] * entries + other[None, :], same, float("-inf"))
            share = log_add(share, more - total[:, None])
        best = tl.where(first, key_of(tl.max(share, 0)), NO_KEY)
        tl.store(keys + entry, best, mask=entry < entries)
    wrong = tl.minimum(excess / tl.maximum(count, 1).to(tl.float32), 0.0)
    tl.store(correction + rows, wrong, mask=real)

    chosen += here * budget
    least, equal = least_taken(keys, entries, budget, KEYS)
    store_taken(keys, entries, budget, least, equal, chosen, taken, KEYS)
    for start in range(0, budget, TILE):
        place = start + tl.arange(0, TILE)
        entry = tl.load(chosen + place, mask=place < budget, other=-1)
        code = tl.load(listed + entry, mask=entry >= 0, other=0)
        tl.store(chosen + place, code // MEANS, mask=entry >= 0)
    tl.debug_barrier()
    if TOP_P:
        keep_enough(
            chosen, taken, budget, page_logit, mass, rows, row, own, columns,
            head_pages, beam_pages, sink, window, top_p, NODE, GROUP, ROWS, TILE,
        )  # fmt: skip
    if NODE > 0:
        _to_pages(chosen, budget, listed_pages, TILE)


@triton.jit
def _to_pages(chosen, budget, listed_pages, TILE: tl.constexpr):
    """Columns become pages."""
    for start in range(0, budget, TILE):
        place = start + tl.arange(0, TILE)
        column = tl.load(chosen + place, mask=place < budget, other=-1)
        page = tl.load(listed_pages + column, mask=column >= 0, other=-1)
        tl.store(chosen + place, page, mask=column >= 0)
