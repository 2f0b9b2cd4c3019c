"""Where a context is long: the heaviest nodes, whose pages are weighed one by one, on a GPU.

What kernels weigh stands in *columns*. Without nodes a column is the page of its number. With them
the columns are, in page order: the head, which holds the sink; the pages of the nodes in the beam;
the tail, which holds the window. All other nodes are keys of their own (``weigh.weigh_nodes``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hip_kernels.checks import check, check_summaries
from hip_kernels.layout import NODE_PAGES, DecodeSteps, SparsePlan, Summaries
from hip_kernels.select.best import KEYS_A_TILE, NO_KEY, key_of, least_taken, store_taken
from hip_kernels.select.weigh import check_beam
from hip_kernels.tiles import PAGES_A_TILE, log_add, log_sum_exp, mass_of, rows_of_group

ALWAYS = tl.constexpr(2**31 - 1)


@dataclass(frozen=True)
class Columns:
    """How many columns there are, and of what."""

    head: int  # pages before the first node
    beam: int  # pages of the beam
    tail: int  # pages after the last node, at most

    def __len__(self) -> int:
        return self.head + self.beam + self.tail


@dataclass(frozen=True)
class Nodes:
    """The nodes of decode steps [B]."""

    summaries: Summaries
    table: Tensor  # [B, J] where each request's nodes are, in order
    logit: Tensor  # [B, Hq, J] float32: each as one key; -inf in the beam, and where it is none
    pages: Tensor  # [B, Hkv, S] int64: the logical page of each column; -1 is none
    columns: Columns

    @classmethod
    def of(cls, summaries: Summaries, table: Tensor, heads: int, plan: SparsePlan) -> Nodes:
        (batch, count), kv_heads = table.shape, len(summaries.sigma)
        logit = torch.empty(batch, heads, count, dtype=torch.float32, device=table.device)
        head = -(-plan.sink_pages // NODE_PAGES) * NODE_PAGES
        columns = Columns(head, min(plan.beam, count) * NODE_PAGES, plan.window_pages + NODE_PAGES)
        pages = table.new_empty(batch, kv_heads, len(columns))
        return cls(summaries, table.contiguous(), logit, pages, columns)

    def check(self, batch: int, heads: int, kv_heads: int) -> None:
        """Assert that the tensors belong together."""
        check_summaries("nodes.summaries", self.summaries, kv_heads)
        check("nodes.table", self.table, (batch, None), torch.int64)
        check("nodes.logit", self.logit, (batch, heads, self.table.shape[1]), torch.float32)
        check("nodes.pages", self.pages, (batch, kv_heads, len(self.columns)), torch.int64)


def choose_beam(
    nodes: Nodes,
    steps: DecodeSteps,
    plan: SparsePlan,
    held: Tensor | None,
    mass: Tensor,
    edge_tiles: int,
) -> None:
    """Choose the beam by the logits of nodes, take it out of them, and list the columns' pages.

    ``mass`` [B, Hq, T] holds those of the tiles of nodes, then of head and tail; afterwards the
    first of them is that of all nodes that are not in the beam. Nodes of pages ``held``
    [B, Hkv, K] are in it, however light they are.
    """
    (batch, heads, count), kv_heads = nodes.logit.shape, nodes.pages.shape[1]
    columns, beam = nodes.columns, nodes.columns.beam // NODE_PAGES
    chosen = nodes.pages.new_empty(batch, kv_heads, beam)
    keys = torch.empty(batch, kv_heads, count, dtype=torch.int32, device=mass.device)
    taken = torch.empty(batch, kv_heads, beam, dtype=torch.int32, device=mass.device)
    group = heads // kv_heads
    if held is not None:
        check_beam(plan, held)
    _beam[(batch, kv_heads)](
        *(nodes.logit, nodes.pages, chosen, steps.page, chosen if held is None else held),
        *(mass, keys, taken, count, beam, 0 if held is None else held.shape[2]),
        *(triton.cdiv(count, PAGES_A_TILE), edge_tiles, mass.shape[2]),
        *(len(columns), columns.head, plan.window_pages),
        NODE=NODE_PAGES,
        GROUP=group,
        ROWS=rows_of_group(group),
        TILE=PAGES_A_TILE,
        KEYS=KEYS_A_TILE,
        num_warps=4,
    )


@triton.jit
def nodes_end(own, head, window, NODE: tl.constexpr):
    """Where the nodes end that lie before the window."""
    return tl.maximum(tl.maximum(own - window, 0) // NODE, head // NODE)


@triton.jit
def page_of(column, columns, own, listed, NODE: tl.constexpr):
    """The logical pages of columns; -1 where there is none before ``own``. NODE 0: no nodes."""
    if NODE > 0:
        page = tl.load(listed + column, mask=(column >= 0) & (column < columns), other=-1)
    else:
        page = tl.where(column < own, column, -1).to(tl.int64)
    return page


@triton.jit
def _beam(
    logit,
    listed,
    beam,
    own_pages,
    held,
    mass,
    keys,
    taken,
    count,  # nodes of the table
    wanted,
    held_count,
    node_tiles,
    edge_tiles,
    tiles,
    columns,
    head_pages,
    window,
    NODE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    here = request * tl.num_programs(1) + tl.program_id(1)
    own = tl.load(own_pages + request)
    first = head_pages // NODE
    end = tl.minimum(nodes_end(own, head_pages, window, NODE), count)
    row = tl.arange(0, ROWS)
    rows = here * GROUP + row  # of [B * Hq]
    real = row < GROUP
    total = mass_of(mass + rows * tiles, real, node_tiles + edge_tiles, ROWS, TILE)
    keys += here * count
    beam += here * wanted
    taken += here * wanted
    held += here * held_count
    for start in range(0, count, TILE):
        node = start + tl.arange(0, TILE)
        candidate = (node >= first) & (node < end)
        known = real[:, None] & candidate[None, :]
        at = logit + rows[:, None] * count + node[None, :]
        share = tl.load(at, mask=known, other=float("-inf")) - total[:, None]
        share = tl.max(tl.where(known, share, float("-inf")), 0)
        key = tl.where(share > float("-inf"), key_of(share), NO_KEY)
        for others in range(0, held_count, TILE):
            place = others + tl.arange(0, TILE)
            page = tl.load(held + place, mask=place < held_count, other=-1)
            wished = tl.where(page >= 0, page // NODE, -1)
            is_held = tl.max((node[:, None] == wished[None, :]).to(tl.int32), 1) > 0
            key = tl.where(is_held & candidate, ALWAYS, key)
        tl.store(keys + node, key, mask=node < count)
    least, equal = least_taken(keys, count, wanted, KEYS)
    store_taken(keys, count, wanted, least, equal, beam, taken, KEYS)

    rest = tl.full((ROWS,), float("-inf"), tl.float32)
    for start in range(0, count, TILE):
        node = start + tl.arange(0, TILE)
        kept = (node >= first) & (node < end)
        for others in range(0, wanted, TILE):
            place = others + tl.arange(0, TILE)
            other = tl.load(beam + place, mask=place < wanted, other=-1)
            kept &= tl.max((node[:, None] == other[None, :]).to(tl.int32), 1) == 0
        known = real[:, None] & (node < count)[None, :]
        at = logit + rows[:, None] * count + node[None, :]
        left = tl.load(at, mask=known & kept[None, :], other=float("-inf"))
        tl.store(at, left, mask=known)
        rest = log_add(rest, log_sum_exp(left))
    for start in range(0, node_tiles, TILE):
        tile = start + tl.arange(0, TILE)
        first_only = tl.where((tile == 0)[None, :], rest[:, None], float("-inf"))
        known = real[:, None] & (tile < node_tiles)[None, :]
        tl.store(mass + rows[:, None] * tiles + tile[None, :], first_only, mask=known)
    listed += here * columns
    beam_pages = wanted * NODE
    for start in range(0, columns, TILE):
        column = start + tl.arange(0, TILE)
        inner = column - head_pages
        inside = (inner >= 0) & (inner < beam_pages)
        node = tl.load(beam + inner // NODE, mask=inside, other=-1)
        page = tl.where(node >= 0, node * NODE + inner % NODE, -1)
        past = nodes_end(own, head_pages, window, NODE) * NODE + inner - beam_pages
        page = tl.where(inside, page, tl.where(inner < 0, column, past))
        tl.store(listed + column, tl.where(page < own, page, -1), mask=column < columns)
