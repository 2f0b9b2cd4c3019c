"""How much of a choice is enough, on a GPU (``reference.enough``)."""

from __future__ import annotations

import triton
import triton.language as tl

from hip_kernels.select.best import NO_KEY
from hip_kernels.select.nodes import nodes_end


@triton.jit
def keep_enough(
    chosen,
    taken,
    budget,
    page_logit,
    parts,
    spread,
    total,  # [ROWS]
    rows,
    row,
    own,
    far,
    columns,
    across,  # from a part to the next
    head_pages,
    beam_pages,
    sink,
    window,
    top_p,
    TOKENS: tl.constexpr,  # of a part
    PARTS: tl.constexpr,
    SPREAD: tl.constexpr,
    NODE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Drop what is chosen beyond ``top_p`` of the mass of every row, best first."""
    real = row < GROUP
    held = tl.zeros((ROWS,), tl.float32)
    for start in range(0, sink + window, TILE):
        number = start + tl.arange(0, TILE)
        page = tl.where(number < sink, number, own - window + number - sink)
        fixed = (number < sink) | ((page >= sink) & (number < sink + window))
        known = real[:, None] & (fixed & (page < own))[None, :]
        column = page
        if NODE > 0:
            past = page - nodes_end(own, head_pages, window, NODE) * NODE
            is_tail = far & (page >= head_pages)
            column = tl.where(is_tail, head_pages + beam_pages + past, page)
        at = page_logit + rows[:, None] * columns + column[None, :]
        logit = tl.load(at, mask=known, other=float("-inf"))
        held += tl.sum(tl.exp(logit - total[:, None]), 1)
    for start in range(0, budget, TILE):
        place = start + tl.arange(0, TILE)
        key = tl.load(taken + place, mask=place < budget, other=NO_KEY)
        before = tl.zeros((ROWS, TILE), tl.float32) + held[:, None]
        for others in range(0, budget, TILE):
            other = others + tl.arange(0, TILE)
            code = tl.load(chosen + other, mask=other < budget, other=-1)
            known = real[:, None] & (code >= 0)[None, :]
            at = rows[:, None] * columns + (code // PARTS)[None, :]
            if PARTS == 1:
                logit = tl.load(page_logit + at, mask=known, other=float("-inf"))
            else:
                part = (code % PARTS * across)[None, :]
                logit = tl.load(parts + part + at, mask=known, other=float("-inf"))
                logit += tl.log(float(TOKENS))
                if SPREAD:
                    logit += tl.load(spread + at, mask=known, other=0.0)
            share = tl.exp(logit - total[:, None])
            rival = tl.load(taken + other, mask=other < budget, other=NO_KEY)
            tie = (rival[:, None] == key[None, :]) & (other[:, None] < place[None, :])
            better = (rival[:, None] > key[None, :]) | tie
            before += tl.dot(share, better.to(tl.float32), input_precision="ieee")
        wanting = tl.max(tl.where(real[:, None], top_p - before, float("-inf")), 0) > 0
        # all is decided before anything is dropped
        tl.store(taken + budget + place, wanting.to(tl.int32), mask=place < budget)
    tl.debug_barrier()
    for start in range(0, budget, TILE):
        place = start + tl.arange(0, TILE)
        kept = tl.load(taken + budget + place, mask=place < budget, other=1) > 0
        tl.store(chosen + place, tl.full((TILE,), -1, tl.int64), mask=(place < budget) & ~kept)
    tl.debug_barrier()
