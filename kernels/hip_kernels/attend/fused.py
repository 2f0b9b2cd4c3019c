"""A sparse decode step by kernels: weigh, choose, attend.

The same as ``reference.attend`` for the blocks that it serves. What chooses, between the two
kernels, is the reference's torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hip_kernels.attend import triton as attending
from hip_kernels.attend.reference import rows_of
from hip_kernels.layout import Choice, PagedKV, QueryBlocks, Selection, SparsePlan, Summaries
from hip_kernels.select import triton as weighing
from hip_kernels.select.reference import select, with_fixed_pages
from hip_kernels.select.weigh import NEVER, Context, PageLogits


def serves(blocks: QueryBlocks, plan: SparsePlan) -> bool:
    """Whether these blocks are decode steps of the kind that has kernels."""
    one_row = blocks.tokens.shape[1] == 1 and blocks.local is not None and blocks.nodes is None
    return one_row and plan.strategy == "summary" and plan.remainder in weighing.GUARDS


def attend(
    query: Tensor,
    kv: PagedKV,
    summaries: Summaries,
    blocks: QueryBlocks,
    plan: SparsePlan,
    scale: float,
    out: Tensor,
    choice: Choice | None = None,
) -> Selection:
    """Attend one token a request and write its row of ``out``, as ``reference.attend`` does."""
    table = blocks.table.expand(len(blocks), -1).contiguous()  # [N, P]
    token = blocks.tokens.squeeze(1)
    q = query.index_select(0, token)  # [N, Hq, D]
    scores = weighing.Scores.empty(
        len(blocks), q.shape[1], table.shape[1], summaries.mean.shape[1], q.device
    )
    weighing.score(q, summaries, table, blocks.page, plan, scale, scores)
    context = _context(scores, blocks.page, kv.kv_heads, plan)
    if choice is None:
        rows = rows_of(query, blocks, kv.kv_heads) * scale
        chosen, correction = select(rows, context, kv, blocks, plan)
    else:
        chosen = choice.pages.transpose(0, 1)
        correction = choice.correction.transpose(0, 1).unsqueeze(-1)
    pages = with_fixed_pages(chosen, blocks.page, plan)  # [Hkv, N, K] logical
    if plan.remainder == "none":
        rest = torch.full_like(scores.page, NEVER)
    else:
        # without nodes a column is the page of its number
        [(logit, _)] = context.remainder(chosen, blocks.page, plan)
        rest = (logit + correction).transpose(0, 1).flatten(1, 2)
    exact = pages.transpose(0, 1).contiguous()
    length = blocks.position.squeeze(1) + 1
    step = attending.DecodeStep(table, length, exact, rest.contiguous())
    result = out.new_empty(len(blocks), *out.shape[1:])
    estimated = rest.new_empty(len(blocks), q.shape[1])
    attending.decode(q, kv, summaries, step, scale, plan.logit_cap, result, estimated)
    out[token] = result
    return Selection(
        pages.transpose(0, 1),
        Choice(chosen.transpose(0, 1), correction.squeeze(-1).transpose(0, 1)),
        estimated.view(len(blocks), kv.kv_heads, -1),
        plan.sink_pages,
        plan.window_pages,
    )


def _context(scores: weighing.Scores, visible: Tensor, kv_heads: int, plan: SparsePlan) -> Context:
    """The scores as selection reads them: heads first, a column for each page of a request."""

    def heads_first(of: Tensor) -> Tensor:  # [..., N, Hq, P] -> [..., Hkv, N, G, P]
        split = of.view(*of.shape[:-2], kv_heads, -1, of.shape[-1])
        return split.transpose(-4, -3)

    number = torch.arange(scores.page.shape[-1], device=visible.device)
    page = number.where(number < visible[:, None], -1)
    spread = heads_first(scores.spread) if weighing.GUARDS[plan.remainder] else None
    logits = PageLogits(heads_first(scores.page), heads_first(scores.parts), spread)
    # the values of pages are the attending kernel's to read
    return Context(page[None], logits, scores.page.new_empty(0))
