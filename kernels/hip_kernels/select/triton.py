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
from hip_kernels.layout import NODE_PAGES, PAGE_SIZE, DecodeSteps, SparsePlan, Summaries
from hip_kernels.select.nodes import Columns, Nodes, choose_beam, nodes_end, page_of
from hip_kernels.tiles import PAGES_A_TILE, load_rows, log_sum_exp, rows_of_group, soft_capped

GUARDS = {"none": 0, "mean": 0, "quadratic": 1, "harmonic": 2}


@dataclass(frozen=True)
class Scores:
    """What each column of a step weighs for the heads of one token, -inf where it has none."""

    columns: Columns
    page: Tensor  # [B, Hq, S] float32: the logit of the page as one key
    parts: Tensor  # [L, B, Hq, S] float32: q . mean of each sub-page
    spread: Tensor  # [B, Hq, S] float32: the guarded second cumulant, written where there is one
    mass: Tensor  # [B, Hq, T] float32: the log-sum-exp of each tile of ``PAGES_A_TILE`` columns
    nodes: Nodes | None = None

    @classmethod
    def of(
        cls,
        steps: DecodeSteps,
        heads: int,
        means: int,
        nodes: Nodes | None = None,
    ) -> Scores:
        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=steps.table.device)

        columns = Columns(steps.table.shape[1], 0, 0) if nodes is None else nodes.columns
        shape = len(steps), heads, len(columns)
        mass = empty(len(steps), heads, sum(tiles_of(columns, nodes)))
        return cls(columns, empty(*shape), empty(means, *shape), empty(*shape), mass, nodes)

    def check(self, batch: int, heads: int, pages: int) -> None:
        """Assert that the tensors belong together."""
        shape = batch, heads, len(self.columns)
        assert self.nodes or shape[2] == pages, f"scores are of {shape[2]} pages, not of {pages}"
        check("scores.page", self.page, shape, torch.float32)
        check("scores.parts", self.parts, (None, *shape), torch.float32)
        check("scores.spread", self.spread, shape, torch.float32)
        tiles = sum(tiles_of(self.columns, self.nodes))
        check("scores.mass", self.mass, (batch, heads, tiles), torch.float32)


def tiles_of(columns: Columns, nodes: Nodes | None) -> tuple[int, int, int]:
    """Tiles of nodes, of head and tail, and of the beam."""
    count = 0 if nodes is None else nodes.table.shape[1]
    sizes = count, columns.head + columns.tail, columns.beam
    return tuple(triton.cdiv(size, PAGES_A_TILE) for size in sizes)


def score(
    query: Tensor,
    summaries: Summaries,
    steps: DecodeSteps,
    plan: SparsePlan,
    scale: float,
    out: Scores,
    held: Tensor | None = None,
) -> None:
    """Weigh what is before each step: query [T, Hq, D].

    Pages that are ``held`` [B, Hkv, K] have columns, however light their nodes are.
    """
    batch, heads, width = len(steps), *query.shape[1:]
    pages, kv_heads = steps.table.shape[1], len(summaries.sigma)
    means, columns, nodes = summaries.mean.shape[1], out.columns, out.nodes
    assert plan.remainder in GUARDS, f"plan.remainder {plan.remainder} has no kernel: {[*GUARDS]}"
    assert heads % kv_heads == 0, f"query has {heads} heads, no multiple of {kv_heads} KV heads"
    check("query", query, (None, None, summaries.mean.shape[-1]))
    check_steps("steps", steps)
    check_summaries("summaries", summaries, kv_heads)
    out.check(batch, heads, pages)
    assert len(out.parts) == means, f"scores.parts are of {len(out.parts)} means, not of {means}"
    if nodes is not None:
        nodes.check(batch, heads, kv_heads)
        assert nodes.summaries.mean.shape[1] == means, "nodes and pages have as many means"
    group = heads // kv_heads
    node_tiles, edge_tiles, beam_tiles = tiles_of(columns, nodes)
    count = 0 if nodes is None else nodes.table.shape[1]

    def launch(tiles: int, first_tile: int, *, beam: bool) -> None:
        # without nodes what is theirs is not read
        of, table, logit, listed = (
            (summaries, steps.table, out.page, steps.table)
            if nodes is None
            else (nodes.summaries, nodes.table, nodes.logit, nodes.pages)
        )
        _score[(tiles, batch, kv_heads)](
            *(query, steps.token, steps.page, summaries.mean, summaries.sigma, steps.table),
            *(of.mean, of.sigma, table, listed, out.page, out.parts, out.spread, logit),
            *(out.mass, float(scale), float(plan.logit_cap)),
            *(len(columns), columns.head, columns.beam, plan.window_pages),
            *(pages, summaries.pages, count, of.pages),
            *(first_tile, 0 if beam else node_tiles, node_tiles + edge_tiles + beam_tiles),
            PAGE=PAGE_SIZE,
            NODE=0 if nodes is None else NODE_PAGES,
            BEAM=beam,
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

    launch(node_tiles + edge_tiles, 0, beam=False)
    if nodes is not None:
        choose_beam(nodes, steps, plan, held, out.mass, edge_tiles)
        launch(beam_tiles, node_tiles + edge_tiles, beam=True)


@triton.jit
def _score(
    query,
    token,
    own_pages,
    mean,
    sigma,
    table,
    node_mean,
    node_sigma,
    node_table,
    listed,
    page_out,
    parts_out,
    spread_out,
    node_out,
    mass_out,
    scale,
    cap,
    columns,
    head_pages,
    beam_pages,
    window,
    pages,  # of the table
    pool_pages,  # that the summaries have room for
    nodes,  # of their table
    pool_nodes,
    first_tile,  # of ``mass_out``
    node_tiles,  # the first programs weigh nodes
    tiles,
    PAGE: tl.constexpr,
    NODE: tl.constexpr,
    BEAM: tl.constexpr,
    MEANS: tl.constexpr,
    GROUP: tl.constexpr,
    GUARD: tl.constexpr,
    CAPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    tile = tl.program_id(0)
    request = tl.program_id(1).to(tl.int64)
    head = tl.program_id(2).to(tl.int64)
    kv_heads = tl.num_programs(2)
    own = tl.load(own_pages + request)
    row = tl.arange(0, ROWS)
    here = (request * kv_heads + head) * GROUP + row  # of a row of [B * Hq]
    d = tl.arange(0, BLOCK)
    real = (row < GROUP)[:, None] & (d < WIDTH)[None, :]
    asked = (tl.load(token + request) * kv_heads + head) * GROUP + row
    q = tl.load(query + asked[:, None] * WIDTH + d[None, :], mask=real, other=0.0)
    q = q.to(tl.float32) * scale
    across = tl.num_programs(1) * kv_heads * GROUP * columns  # from a part to the next
    lane = tl.arange(0, TILE)
    is_node = tile < node_tiles
    column = (tile - node_tiles) * TILE + lane
    last = columns
    if BEAM:
        column += head_pages
        last = head_pages + beam_pages
    if NODE > 0 and not BEAM:
        # the pages before and after the nodes, while the beam is not known
        past = nodes_end(own, head_pages, window, NODE) * NODE + column - head_pages
        page = tl.where(column < head_pages, column, past)
        page = tl.where(page < own, page, -1)
        column = tl.where(column < head_pages, column, column + beam_pages)
    else:
        listed += (request * kv_heads + head) * columns
        page = page_of(column, last, own, listed, NODE)
    seen = (column < last) & (page >= 0)
    place = tl.load(table + request * pages + page, mask=seen & ~is_node, other=0)
    if NODE > 0 and not BEAM:
        node = tile * TILE + lane
        end = tl.minimum(nodes_end(own, head_pages, window, NODE), nodes)
        inside = (node >= head_pages // NODE) & (node < end)
        of_node = tl.load(node_table + request * nodes + node, mask=inside & is_node, other=0)
        if is_node:
            total = _weigh(
                q, node_mean, node_sigma, of_node, inside, head, pool_nodes, cap,
                node_out, parts_out, spread_out, here, node, nodes, nodes, across,
                PAGE * NODE, MEANS, GROUP, GUARD, CAPS, False, WIDTH, BLOCK, ROWS, TILE,
            )  # fmt: skip
        else:
            total = _weigh(
                q, mean, sigma, place, seen, head, pool_pages, cap,
                page_out, parts_out, spread_out, here, column, columns, last, across,
                PAGE, MEANS, GROUP, GUARD, CAPS, True, WIDTH, BLOCK, ROWS, TILE,
            )  # fmt: skip
    else:
        total = _weigh(
            q, mean, sigma, place, seen, head, pool_pages, cap,
            page_out, parts_out, spread_out, here, column, columns, last, across,
            PAGE, MEANS, GROUP, GUARD, CAPS, True, WIDTH, BLOCK, ROWS, TILE,
        )  # fmt: skip
    tl.store(mass_out + here * tiles + first_tile + tile, total, mask=row < GROUP)


@triton.jit
def _weigh(
    q,
    mean,
    sigma,
    place,
    seen,
    head,
    room,  # for summaries
    cap,
    out,
    parts_out,
    spread_out,
    here,
    column,
    columns,
    last,
    across,
    TOKENS: tl.constexpr,
    MEANS: tl.constexpr,
    GROUP: tl.constexpr,
    GUARD: tl.constexpr,
    CAPS: tl.constexpr,
    KEEPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Weigh a tile of summaries of ``TOKENS`` keys each; returns its mass, a row at a time."""
    stored = (tl.arange(0, ROWS) < GROUP)[:, None] & (column < last)[None, :]
    there = here[:, None] * columns + column[None, :]
    top = tl.full((ROWS, TILE), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, TILE), tl.float32)
    for part in tl.static_range(MEANS):
        logit = part_logits(q, mean, (head * MEANS + part) * room + place, seen, WIDTH, BLOCK)
        if CAPS:
            logit = soft_capped(logit, cap)
        better = tl.maximum(top, logit)
        total = total * tl.exp(top - better) + tl.exp(logit - better)
        top = better
        if KEEPS:
            logit = tl.where(seen[None, :], logit, float("-inf"))
            tl.store(parts_out + part * across + there, logit, mask=stored)
    estimate = top + tl.log(total * (TOKENS // MEANS))
    if GUARD > 0:
        slope = 1.0
        if CAPS:
            slope = 1 - (top / cap) * (top / cap)
        more = guarded(q, sigma, head * room + place, seen, slope, GUARD, WIDTH, BLOCK)
        estimate += more
        if KEEPS:
            more = tl.where(seen[None, :], more, float("-inf"))
            tl.store(spread_out + there, more, mask=stored)
    estimate = tl.where(seen[None, :], estimate, float("-inf"))
    tl.store(out + there, estimate, mask=stored)
    return log_sum_exp(estimate)


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
