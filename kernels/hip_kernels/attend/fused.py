"""A decode step by kernels: weigh, choose, attend.

The same as ``reference.attend`` for the blocks that it serves, in four launches; nothing waits for
the GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hip_kernels.attend.triton import DecodeStep, decode
from hip_kernels.layout import Choice, PagedKV, QueryBlocks, Selection, SparsePlan, Summaries
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
    table = blocks.table.expand(len(blocks), -1).contiguous()  # [N, P]
    token = blocks.tokens.squeeze(1)
    q = query.index_select(0, token)  # [N, Hq, D]
    empty = q.new_empty(*q.shape[:2], 0, dtype=torch.float32)
    chosen, logits = None, empty
    if blocks.local is not None:
        count, means = table.shape[1], summaries.mean.shape[1]
        scores = weighing.Scores.empty(len(blocks), q.shape[1], count, means, q.device)
        weighing.score(q, summaries, table, blocks.page, plan, scale, scores)
        if choice is None:
            chosen = choose(q, kv, scores, table, blocks.page, plan, scale)
        else:
            chosen = Chosen(choice.pages.contiguous(), choice.correction.flatten(1))
        logits = empty if plan.remainder == "none" else scores.page
    estimated = q.new_empty(q.shape[:2], dtype=torch.float32)
    length = blocks.position.squeeze(1) + 1
    step = DecodeStep(table, blocks.page, length, chosen, logits)
    result = out.new_empty(len(blocks), *out.shape[1:])
    decode(q, kv, summaries, step, plan, scale, result, estimated)
    out[token] = result
    if chosen is None:
        return None
    groups = len(blocks), kv.kv_heads, -1
    found = Choice(chosen.pages, chosen.correction.view(groups))
    return Selection(found, estimated.view(groups), blocks.page, plan)
