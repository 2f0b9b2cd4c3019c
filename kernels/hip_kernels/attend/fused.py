"""Attention by kernels: weigh, choose, attend.

The same as ``reference.attend`` for the blocks that it serves; nothing waits for the GPU. A decode
step is three launches, four where it searches through nodes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hip_kernels.attend import prefill
from hip_kernels.attend.triton import decode
from hip_kernels.layout import (
    PAGE_SIZE,
    WIDEST_OF_BLOCKS,
    Choice,
    QueryBlocks,
    Selection,
    SparsePlan,
    Summaries,
)
from hip_kernels.offloaded import OffloadedKV
from hip_kernels.resolve.triton import bring
from hip_kernels.select import prefill as weighing_blocks
from hip_kernels.select import prefill_nodes as searching_blocks
from hip_kernels.select.best import best_pages
from hip_kernels.select.choose import Shortlist, look
from hip_kernels.select.parts import Part, every_page
from hip_kernels.select.prefill_enough import keep_enough
from hip_kernels.select.scores import Scores
from hip_kernels.select.triton import weigh
from hip_kernels.select.weigh import check_beam
from hip_kernels.steps import NO_PAGE, DecodeSteps
from hip_kernels.stored import StoredKV


def serves(blocks: QueryBlocks, plan: SparsePlan, width: int) -> bool:
    """Whether blocks of this kind, with heads of ``width`` channels, have kernels."""
    if blocks.local is None:
        return True
    return plan.has_kernels and (width <= WIDEST_OF_BLOCKS or blocks.tokens.shape[1] == 1)


def attend(
    query: Tensor,
    kv: StoredKV,
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
        return _attend_rows(query, kv, summaries, blocks, plan, scale, out, nodes, choice)
    return _attend_blocks(query, kv, summaries, blocks, plan, scale, out, nodes)


def _attend_blocks(
    query: Tensor,
    kv: StoredKV,
    summaries: Summaries,
    blocks: QueryBlocks,
    plan: SparsePlan,
    scale: float,
    out: Tensor,
    nodes: Summaries | None,
) -> Selection | None:
    """Blocks of 64 rows."""
    if blocks.local is None:
        prefill.attend_all(query, kv, blocks, scale, plan.logit_cap, out)
        return None
    count, heads = len(blocks), query.shape[1]
    parts: tuple[Part, ...] = (every_page(summaries, blocks),)
    if blocks.nodes is not None:
        assert nodes is not None, "these blocks search through nodes; there are none"
        parts = searching_blocks.search(query, summaries, nodes, blocks, plan, scale)
    # the last has pages
    *_, pages = parts
    mass = query.new_empty(count, heads, PAGE_SIZE, dtype=torch.float32)
    score = mass.new_empty(count, kv.kv_heads, pages.columns)
    weighing_blocks.mass(query, parts, blocks, plan, scale, mass)
    weighing_blocks.score(query, pages, blocks, plan, scale, mass, score)
    chosen, keys = best_pages(score, blocks.page, plan, pages.listed)
    if plan.top_p < 1:
        keep_enough(query, summaries, blocks, plan, scale, mass, chosen, keys)
    estimated = torch.empty_like(mass)
    prefill.attend(query, kv, parts, blocks, chosen, plan, scale, out, estimated)
    # rows first, then the heads of a group, as the reference has them
    share = estimated.view(count, kv.kv_heads, -1, PAGE_SIZE).transpose(2, 3).flatten(2)
    plan = plan.of_rows(PAGE_SIZE)
    return Selection(Choice(chosen, torch.zeros_like(share)), share, blocks.page, plan)


def _attend_rows(
    query: Tensor,
    kv: StoredKV,
    summaries: Summaries,
    blocks: QueryBlocks,
    plan: SparsePlan,
    scale: float,
    out: Tensor,
    nodes: Summaries | None,
    choice: Choice | None,
) -> Selection | None:
    """Decode steps beside prompts, and the last rows of these."""
    steps = DecodeSteps.of(blocks, reuses=choice is not None)
    if choice is not None:
        assert plan.parts == 1, "only a choice of whole pages is used again"
        if steps.nodes is not None:
            check_beam(plan, choice.entries)
    if choice is None:
        group = query.shape[1] // kv.kv_heads
        choice = Choice.empty(len(steps), kv.kv_heads, group, plan, query.device)
    estimated = query.new_empty(len(steps), query.shape[1], dtype=torch.float32)
    attend_steps(query, kv, summaries, steps, choice, plan, scale, out, estimated, nodes)
    if blocks.local is None:
        return None
    return Selection(choice, estimated.view(choice.correction.shape), blocks.page, plan)


def attend_steps(
    query: Tensor,
    kv: StoredKV,
    summaries: Summaries,
    steps: DecodeSteps,
    choice: Choice,
    plan: SparsePlan,
    scale: float,
    out: Tensor,
    estimated: Tensor,
    nodes: Summaries | None,
) -> None:
    """Attend decode steps (``ops.attend_steps``)."""
    kept = scores = None
    # where no step prunes there is nothing to weigh
    if steps.sparse_from < NO_PAGE:
        kept = choice
        scores = Scores.of(steps, query.shape[1], kv.kv_heads, summaries.mean.shape[1], plan)
        scratch = Shortlist.of(scores, kv.kv_heads, plan)
        weigh(query, summaries, nodes, steps, choice, plan, scale, scores, scratch)
        if plan.second_look:
            look(query, kv, scores, scratch, steps, choice, plan, scale)
    if isinstance(kv, OffloadedKV):
        pages = None if kept is None else kept.entries
        pages = bring(
            *(kv, steps.table, steps.page, pages, steps.row, steps.reuses, plan),
            *(steps.sparse_from, kv.miss_policy == "estimate"),
        )
        kept = None if pages is None else Choice(pages, choice.correction)
    rest = None if plan.remainder == "none" else scores
    decode(query, kv, summaries, nodes, steps, kept, rest, plan, scale, out, estimated)
