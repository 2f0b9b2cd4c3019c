"""Where a context is long: the heaviest nodes, whose pages are weighed one by one, on a GPU.

What the columns are is in ``scores.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hip_kernels.select.best import NO_KEY, key_of, least_taken, store_taken
from hip_kernels.tiles import log_add, log_sum_exp, mass_of

ALWAYS = tl.constexpr(2**31 - 1)


@triton.jit
def nodes_end(own, head, window, NODE: tl.constexpr):
    """Where the nodes end that lie before the window."""
    return tl.maximum(tl.maximum(own - window, 0) // NODE, head // NODE)


@triton.jit
def page_of(column, columns, own, listed, far, NODE: tl.constexpr):
    """The logical pages of columns; -1 where there is none before ``own``. NODE 0: no nodes."""
    page = tl.where((column >= 0) & (column < own), column, -1).to(tl.int64)
    if NODE > 0:
        inside = far & (column >= 0) & (column < columns)
        page = tl.where(far, tl.load(listed + column, mask=inside, other=-1), page)
    return page


@triton.jit
def choose_beam(
    logit,
    mass,
    rows,  # [ROWS] of [B * Hq]
    real,
    own,
    keys,
    taken,
    beam,
    listed,
    held,
    held_count,
    count,  # nodes of a table
    end,  # those of this step
    tiles,  # of masses that are known: of nodes, then of head and tail
    room,  # for masses
    node_tiles,
    wanted,
    columns,
    head_pages,
    window,
    NODE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Choose the beam by the logits of nodes, take it out of them, and list the columns' pages.

    Afterwards the first mass is that of all nodes that are not in the beam, and those of the other
    tiles of nodes are none. Nodes of pages ``held`` are in it, however light they are.
    """
    first = head_pages // NODE
    end = end.to(tl.int32)
    total = mass_of(mass + rows * room, real, tiles, ROWS, TILE)
    for start in range(0, end, TILE):
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
            wished = tl.where(page >= 0, page // NODE, -1).to(tl.int32)
            is_held = tl.max((node[:, None] == wished[None, :]).to(tl.int32), 1) > 0
            key = tl.where(is_held & candidate, ALWAYS, key)
        tl.store(keys + node, key, mask=node < end)
    least, equal = least_taken(keys, end, wanted, KEYS)
    store_taken(keys, end, wanted, least, equal, beam, taken, KEYS)

    rest = tl.full((ROWS,), float("-inf"), tl.float32)
    for start in range(0, end, TILE):
        node = start + tl.arange(0, TILE)
        kept = (node >= first) & (node < end)
        for others in range(0, wanted, TILE):
            place = others + tl.arange(0, TILE)
            other = tl.load(beam + place, mask=place < wanted, other=-1).to(tl.int32)
            kept &= tl.max((node[:, None] == other[None, :]).to(tl.int32), 1) == 0
        known = real[:, None] & (node < end)[None, :]
        at = logit + rows[:, None] * count + node[None, :]
        left = tl.load(at, mask=known & kept[None, :], other=float("-inf"))
        tl.store(at, left, mask=known)
        rest = log_add(rest, log_sum_exp(left))
    for start in range(0, node_tiles, TILE):
        tile = start + tl.arange(0, TILE)
        first_only = tl.where((tile == 0)[None, :], rest[:, None], float("-inf"))
        known = real[:, None] & (tile < node_tiles)[None, :]
        tl.store(mass + rows[:, None] * room + tile[None, :], first_only, mask=known)
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
    tl.debug_barrier()
