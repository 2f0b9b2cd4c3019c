"""What pages weigh, on a GPU, and which are the most promising: one launch, two through nodes.

The same estimate as ``weigh.page_logits``, where the mathematics is. The programs of a step go
through its tiles of columns together; the last of them to finish makes the shortlist.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hip_kernels.checks import check, check_choice, check_steps, check_summaries
from hip_kernels.layout import GUARDS, NODE_PAGES, PAGE_SIZE, Choice, SparsePlan, Summaries
from hip_kernels.select.best import KEYS_A_TILE
from hip_kernels.select.choose import Shortlist, shortlist
from hip_kernels.select.nodes import choose_beam, nodes_end
from hip_kernels.select.scores import Scores, tiles_of
from hip_kernels.steps import DecodeSteps
from hip_kernels.tiles import (
    ENTRIES_A_TILE,
    PAGES_A_TILE,
    arrivals,
    arrives_last,
    load_rows,
    log_sum_exp,
    mass_of,
    rows_of_group,
    soft_capped,
)

# programs that a launch has, where there is work for as many
PROGRAMS = 1024


def weigh(
    query: Tensor,
    summaries: Summaries,
    nodes: Summaries | None,
    steps: DecodeSteps,
    choice: Choice,
    plan: SparsePlan,
    scale: float,
    out: Scores,
    scratch: Shortlist,
) -> None:
    """Weigh what is before each step that prunes: query [T, Hq, D].

    For steps that do not use their ``choice`` again, the most promising sub-pages are listed in
    ``scratch``, or, where there is no second look, chosen into ``choice``. Of others the nodes of
    what they chose are in the beam, however light these are.
    """
    batch, heads, width = len(steps), *query.shape[1:]
    pages, kv_heads = steps.table.shape[1], len(summaries.sigma)
    means, columns, looks = summaries.mean.shape[1], out.columns, plan.second_look > 0
    budget, count = choice.entries.shape[2], out.node.shape[2]
    assert plan.remainder in GUARDS, f"plan.remainder {plan.remainder} has no kernel: {[*GUARDS]}"
    assert heads % kv_heads == 0, f"query has {heads} heads, no multiple of {kv_heads} KV heads"
    assert budget > 0, "choice has room for no page; a step chooses one or more"
    assert looks or plan.parts == 1, "without a second look a step chooses whole pages"
    check("query", query, (None, None, summaries.mean.shape[-1]))
    check_steps("steps", steps)
    check_summaries("summaries", summaries, kv_heads)
    check_choice("choice", choice, kv_heads, heads)
    out.check(batch, heads)
    assert len(out.parts) == means, f"scores.parts are of {len(out.parts)} means, not of {means}"
    # without nodes what is theirs is not read
    of_nodes, node_table = summaries, steps.table
    if steps.nodes is not None:
        assert nodes is not None, "these steps search through nodes; there are none"
        check_summaries("nodes", nodes, kv_heads)
        assert nodes.mean.shape[1] == 1, "a node has one mean"
        of_nodes, node_table = nodes, steps.nodes
    group = heads // kv_heads
    tiles = tiles_of(columns, count)
    splits = min(tiles, max(1, triton.cdiv(PROGRAMS, batch * kv_heads)))
    listed = scratch.listed if looks else choice.entries
    # what spills with four warps
    crowded = width > 128 or group > 16
    for beam in (False,) if steps.nodes is None else (False, True):
        _weigh[(splits, batch, kv_heads)](
            *(query, steps.token, steps.page, steps.row, steps.reuses, steps.table, node_table),
            *(summaries.mean, summaries.sigma, of_nodes.mean, of_nodes.sigma),
            *(out.page, out.parts, out.spread, out.node, out.mass, out.total, out.listed),
            *(choice.entries, choice.correction, listed, scratch.keys, scratch.taken, scratch.beam),
            *(arrivals(query.device, batch * kv_heads), float(scale), float(plan.logit_cap)),
            *(float(plan.top_p), steps.sparse_from, steps.far_from),
            *(pages, summaries.pages, count, of_nodes.pages),
            *(len(columns), columns.far, columns.head, columns.beam, out.mass.shape[2]),
            *(budget, listed.shape[2], scratch.keys.shape[2], scratch.taken.shape[2]),
            *(plan.sink_pages, plan.window_pages),
            PAGE=PAGE_SIZE,
            NODE=0 if steps.nodes is None else NODE_PAGES,
            BEAM=beam,
            LOOKS=looks,
            TOP_P=plan.top_p < 1,
            MEANS=means,
            GROUP=group,
            GUARD=GUARDS[plan.remainder],
            CAPS=plan.logit_cap > 0,
            WIDTH=width,
            BLOCK=triton.next_power_of_2(width),
            ROWS=rows_of_group(group),
            TILE=PAGES_A_TILE,
            ENTRIES=ENTRIES_A_TILE,
            KEYS=KEYS_A_TILE,
            num_warps=8 if crowded or (steps.nodes is not None and not beam) else 4,
            # a tile is read while other programs multiply theirs: two at once would halve these
            num_stages=1,
            # left alone, the assembler spills to have more programs at once
            maxnreg=255,
        )


@triton.jit
def _weigh(
    query,
    token,
    own_pages,
    kept_rows,
    reuses,
    table,
    node_table,
    mean,
    sigma,
    node_mean,
    node_sigma,
    page_out,
    parts_out,
    spread_out,
    node_out,
    mass_out,
    total_out,
    listed_pages,
    chosen,
    correction,
    listed,
    keys,
    taken,
    beam,
    counters,
    scale,
    cap,
    top_p,
    sparse_from,
    nodes_from,
    pages,  # of the table
    pool_pages,  # that the summaries have room for
    nodes,  # of their table
    pool_nodes,
    columns,  # room
    far_columns,
    head_pages,
    beam_pages,
    room,  # for masses
    budget,
    wanted,  # entries of the list, or, without a look, the budget
    places,  # room for keys
    takes,  # room for keys that are taken
    sink,
    window,
    PAGE: tl.constexpr,
    NODE: tl.constexpr,
    BEAM: tl.constexpr,
    LOOKS: tl.constexpr,
    TOP_P: tl.constexpr,
    MEANS: tl.constexpr,
    GROUP: tl.constexpr,
    GUARD: tl.constexpr,
    CAPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    ENTRIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    request = tl.program_id(1).to(tl.int64)
    head = tl.program_id(2).to(tl.int64)
    kv_heads = tl.num_programs(2)
    here = request * kv_heads + head
    own = tl.load(own_pages + request)
    sparse = own >= sparse_from
    far = sparse & (own >= nodes_from)
    row = tl.arange(0, ROWS)
    real = row < GROUP
    rows = here * GROUP + row  # of [B * Hq]
    across = tl.num_programs(1) * kv_heads * GROUP * columns  # from a part to the next
    listed_pages += here * far_columns

    # first the nodes' tiles, then those of pages that are known: all, or head and tail
    node_end = tl.full((), 0, tl.int64)
    weighed = tl.minimum(own, columns)
    if NODE > 0:
        node_end = tl.minimum(nodes_end(own, head_pages, window, NODE), nodes)
        node_end = tl.where(far, node_end, 0)
        weighed = tl.where(far, far_columns - beam_pages, weighed)
    node_tiles = tl.cdiv(node_end, TILE).to(tl.int32)
    tiles = node_tiles + tl.cdiv(weighed, TILE).to(tl.int32)
    first_tile = tl.full((), 0, tl.int32)
    count = tl.where(sparse, tiles, 0)
    if BEAM:
        first_tile = tiles
        count = tl.where(far, tl.cdiv(beam_pages, TILE), 0)
    d = tl.arange(0, BLOCK)
    asked = (tl.load(token + request) * kv_heads + head) * GROUP + row
    shown = sparse & real[:, None] & (d < WIDTH)[None, :]
    q = tl.load(query + asked[:, None] * WIDTH + d[None, :], mask=shown, other=0.0)
    q = q.to(tl.float32) * scale
    lane = tl.arange(0, TILE)
    for tile in range(tl.program_id(0), count, tl.num_programs(0)):
        number = tile * TILE + lane
        if BEAM:
            column = head_pages + number
            stored = number < beam_pages
            page = tl.load(listed_pages + column, mask=stored, other=-1)
        else:
            column = number - node_tiles * TILE
            stored = (column >= 0) & (column < weighed)
            page = column
            if NODE > 0:
                past = nodes_end(own, head_pages, window, NODE) * NODE + column - head_pages
                is_tail = far & (column >= head_pages)
                page = tl.where(is_tail, past, page)
                column = tl.where(is_tail, column + beam_pages, column)
            page = tl.where(stored & (page < own), page, -1)
        seen = page >= 0
        place = tl.load(table + request * pages + page, mask=seen, other=0)
        if NODE > 0 and not BEAM:
            # one product serves both: two in a kernel take twice the registers
            is_node = tile < node_tiles
            inside = is_node & (number >= head_pages // NODE) & (number < node_end)
            of_node = tl.load(node_table + request * nodes + number, mask=inside, other=0)
            place = tl.where(is_node, of_node, place)
            seen = tl.where(is_node, inside, seen)
            if is_node:
                means_of, deviations, space, out, width = (
                    node_mean, node_sigma, pool_nodes, node_out, nodes,
                )  # fmt: skip
            else:
                means_of, deviations, space, out, width = (
                    mean, sigma, pool_pages, page_out, columns,
                )  # fmt: skip
            at = tl.where(is_node, number, column)
            tokens = tl.where(is_node, PAGE * NODE, PAGE // MEANS)
            several = tl.where(is_node, 1, MEANS)
            kept = stored & (tile >= node_tiles)
            stored = tl.where(is_node, number < node_end, stored)
        else:
            means_of, deviations, space, out, width = mean, sigma, pool_pages, page_out, columns
            at, tokens, several, kept = column, PAGE // MEANS, MEANS, stored
        top = tl.full((ROWS, TILE), float("-inf"), tl.float32)
        total = tl.zeros((ROWS, TILE), tl.float32)
        there = rows[:, None] * columns + at[None, :]
        kept = real[:, None] & kept[None, :]
        for part in tl.static_range(MEANS):
            summary = (head * several + part) * space + place
            # a node has one mean: of other parts nothing is read
            logit = part_logits(q, means_of, summary, seen & (part < several), WIDTH, BLOCK)
            if CAPS:
                logit = soft_capped(logit, cap)
            if NODE > 0 and part > 0:
                logit = tl.where(part < several, logit, float("-inf"))
            better = tl.maximum(top, logit)
            total = total * tl.exp(top - better) + tl.exp(logit - better)
            top = better
            logit = tl.where(seen[None, :], logit, float("-inf"))
            tl.store(parts_out + part * across + there, logit, mask=kept)
        estimate = top + tl.log(total * tokens)
        if GUARD > 0:
            slope = 1.0
            if CAPS:
                slope = 1 - (top / cap) * (top / cap)
            summary = head * space + place
            more = guarded(q, deviations, summary, seen, slope, GUARD, WIDTH, BLOCK)
            estimate += more
            more = tl.where(seen[None, :], more, float("-inf"))
            tl.store(spread_out + there, more, mask=kept)
        estimate = tl.where(seen[None, :], estimate, float("-inf"))
        stored = real[:, None] & stored[None, :]
        tl.store(out + rows[:, None] * width + at[None, :], estimate, mask=stored)
        mass = log_sum_exp(estimate)
        tl.store(mass_out + rows * room + first_tile + tile, mass, mask=real)

    if arrives_last(counters + here, tl.num_programs(0)) and sparse:
        kept_row = tl.load(kept_rows + request) * kv_heads + head
        fresh = tl.load(reuses + request) == 0
        keys += here * places
        taken += here * takes
        if BEAM:
            fresh &= far
        elif NODE > 0:
            fresh &= not far
            if far:
                held = tl.where(tl.load(reuses + request) == 0, 0, budget)
                choose_beam(
                    node_out, mass_out, rows, real, own, keys, taken,
                    beam + here * (beam_pages // NODE), listed_pages,
                    chosen + kept_row * budget, held, nodes, node_end, tiles, room, node_tiles,
                    beam_pages // NODE, far_columns,
                    head_pages, window, NODE, ROWS, ENTRIES, KEYS,
                )  # fmt: skip
        if fresh:
            total = mass_of(mass_out + rows * room, real, first_tile + count, ROWS, ENTRIES)
            listed += (here if LOOKS else kept_row) * wanted
            shortlist(
                page_out, parts_out, spread_out, total_out, total, rows, row, here, own, far,
                listed_pages, correction + kept_row * GROUP, keys, listed, taken,
                columns, far_columns, across, wanted, head_pages, beam_pages, sink, window, top_p,
                LOOKS, GUARD > 0, NODE, MEANS, GROUP, ROWS, TOP_P, ENTRIES, KEYS,
            )  # fmt: skip


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
