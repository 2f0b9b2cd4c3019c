"""A decode step by kernels: weigh, choose, attend.

The same as ``reference.attend`` for the blocks that it serves, in four launches; nothing waits for
the GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hip_kernels.attend.triton import decode
from hip_kernels.layout import (
    Choice,
    DecodeSteps,
    PagedKV,
    QueryBlocks,
    Selection,
    SparsePlan,
    Summaries,
)
from hip_kernels.select import triton as weighing
from hip_kernels.select.choose import Chosen, choose


def serves(blocks: QueryBlocks, plan: SparsePlan) -> bool:
    """Whether these blocks are of a kind that has kernels."""
    if blocks.tokens.shape[1] > 1:
        return False
    estimates = plan.strategy == "summary" and plan.remainder in weighing.GUARDS
    return blocks.local is None or (estimates and blocks.nodes is None)


def attend(
    query: Tensor,
    kv: PagedKV,
    summaries: Summaries,
    blocks: QueryBlocks,
    plan: SparsePlan,
    scale: float,
    out: Tensor,
    choice: Choice | None = None,
) -> Selection | None:
    """Attend blocks of one row and write their rows of ``out``, as ``reference.attend`` does."""
    steps = DecodeSteps.of(blocks)
    batch, heads = len(steps), query.shape[1]
    estimated = query.new_empty(batch, heads, dtype=torch.float32)
    chosen, logits = None, estimated.new_empty(batch, heads, 0)
    if blocks.local is not None:
        pages, means = steps.table.shape[1], summaries.mean.shape[1]
        scores = weighing.Scores.empty(batch, heads, pages, means, query.device)
        weighing.score(query, summaries, steps, plan, scale, scores)
        if choice is None:
            chosen = choose(query, kv, scores, steps, plan, scale)
        else:
            chosen = Chosen(choice.pages.contiguous(), choice.correction.flatten(1))
        if plan.remainder != "none":
            logits = scores.page
    decode(query, kv, summaries, steps, chosen, logits, plan, scale, out, estimated)
    if chosen is None:
        return None
    groups = batch, kv.kv_heads, -1
    found = Choice(chosen.pages, chosen.correction.view(groups))
    return Selection(found, estimated.view(groups), blocks.page, plan)
