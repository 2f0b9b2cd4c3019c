"""Attention by kernels: weigh, choose, attend.

The same as ``reference.attend`` for the blocks that it serves; nothing waits for the GPU. A decode
step is four launches, six where it searches through nodes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hip_kernels.attend import prefill
from hip_kernels.attend.triton import decode
from hip_kernels.layout import (
    PAGE_SIZE,
    Choice,
    DecodeSteps,
    PagedKV,
    QueryBlocks,
    Selection,
    SparsePlan,
    Summaries,
)
from hip_kernels.select import prefill as weighing_blocks
from hip_kernels.select import triton as weighing
from hip_kernels.select.best import best_pages
from hip_kernels.select.choose import Chosen, choose
from hip_kernels.select.nodes import Nodes

WIDEST_OF_BLOCKS = 128


def serves(blocks: QueryBlocks, plan: SparsePlan, width: int) -> bool:
    """Whether blocks of this kind, with heads of ``width`` channels, have kernels."""
    if blocks.local is None:
        return True
    estimates = plan.strategy == "summary" and plan.remainder in weighing.GUARDS
    # blocks of many rows spill with wider heads, and what is enough differs by row
    simple = plan.top_p >= 1 and width <= WIDEST_OF_BLOCKS
    return estimates and (simple or blocks.tokens.shape[1] == 1)


def attend(
    query: Tensor,
    kv: PagedKV,
    summaries: Summaries,
    blocks: QueryBlocks,
    plan: SparsePlan,
    scale: float,
    out: Tensor,
    nodes: Summaries | None = None,
    choice: Choice | None = None,
) -> Selection | None:
    """Attend blocks and write their rows of ``out``, as ``reference.attend`` does."""
    if blocks.tokens.shape[1] == 1:
        return _attend_steps(query, kv, summaries, blocks, plan, scale, out, nodes, choice)
    return _attend_blocks(query, kv, summaries, blocks, plan, scale, out)


def _attend_blocks(
    query: Tensor,
    kv: PagedKV,
    summaries: Summaries,
    blocks: QueryBlocks,
    plan: SparsePlan,
    scale: float,
    out: Tensor,
) -> Selection | None:
    """Blocks of 64 rows."""
    if blocks.local is None:
        prefill.attend_all(query, kv, blocks, scale, plan.logit_cap, out)
        return None
    count, heads = len(blocks), query.shape[1]
    mass = query.new_empty(count, heads, PAGE_SIZE, dtype=torch.float32)
    score = mass.new_empty(count, kv.kv_heads, blocks.table.shape[1])
    weighing_blocks.mass(query, summaries, blocks, plan, scale, mass)
    weighing_blocks.score(query, summaries, blocks, plan, scale, mass, score)
    chosen = best_pages(score, blocks.page, plan)
    estimated = torch.empty_like(mass)
    prefill.attend(query, kv, summaries, blocks, chosen, plan, scale, out, estimated)
    # rows first, then the heads of a group, as the reference has them
    share = estimated.view(count, kv.kv_heads, -1, PAGE_SIZE).transpose(2, 3).flatten(2)
    return Selection(Choice(chosen, torch.zeros_like(share)), share, blocks.page, plan)


def _attend_steps(
    query: Tensor,
    kv: PagedKV,
    summaries: Summaries,
    blocks: QueryBlocks,
    plan: SparsePlan,
    scale: float,
    out: Tensor,
    nodes: Summaries | None,
    choice: Choice | None,
) -> Selection | None:
    """Blocks of one row: decode steps, and the last rows of prompts."""
    steps = DecodeSteps.of(blocks)
    batch, heads = len(steps), query.shape[1]
    estimated = query.new_empty(batch, heads, dtype=torch.float32)
    chosen = scores = None
    if blocks.local is not None:
        found = None
        if blocks.nodes is not None:
            assert nodes is not None, "these blocks search through nodes; there are none"
            found = Nodes.of(nodes, blocks.nodes.physical, heads, plan)
        scores = weighing.Scores.of(steps, heads, summaries.mean.shape[1], found)
        if choice is not None:
            chosen = Chosen(choice.pages.contiguous(), choice.correction.flatten(1))
        held = None if chosen is None else chosen.pages
        weighing.score(query, summaries, steps, plan, scale, scores, held)
        if chosen is None:
            chosen = choose(query, kv, scores, steps, plan, scale)
    rest = None if plan.remainder == "none" else scores
    decode(query, kv, summaries, steps, chosen, rest, plan, scale, out, estimated)
    if chosen is None:
        return None
    groups = batch, kv.kv_heads, -1
    made = Choice(chosen.pages, chosen.correction.view(groups))
    return Selection(made, estimated.view(groups), blocks.page, plan)
