"""Which pages a query block attends exactly."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from hip_kernels.layout import PAGE_SIZE, QueryBlocks, SparsePlan, soft_cap
from hip_kernels.select.weigh import LEAST, NEVER, Context, PageLogits, best_of_rows, lookup
from hip_kernels.stored import StoredKV


def select(
    query: Tensor, context: Context, kv: StoredKV, blocks: QueryBlocks, plan: SparsePlan
) -> tuple[Tensor, Tensor]:
    """Choose pages by their share of the softmax mass, estimated and then, if asked, looked at.

    query [Hkv, N, M, D] scaled. Logits of different heads and rows are not comparable: a page
    scores its logit minus the row's log-sum-exp over all that is visible, and then the maximum
    over the rows of the block and the heads of the group. Returns logical pages
    [Hkv, N, budget], in order, -1 for none; and what each row's estimates were found to be wrong
    by, [Hkv, N, M, 1], to be added to them.
    """
    mass = context.mass()
    candidates = context.candidates(blocks.page, plan)
    correction = torch.zeros_like(mass)
    if plan.second_look and blocks.tokens.shape[1] == 1:
        score, correction = look(query, context, mass, candidates, kv, blocks, plan)
    else:
        score = best_of_rows(context.logits.page - mass, blocks)
    columns = best(score, candidates, plan)
    if plan.top_p < 1:
        columns = enough(columns, context, mass, candidates, blocks, plan.top_p)
    return context.pages(columns), correction


def look(
    query: Tensor,
    context: Context,
    mass: Tensor,
    candidates: Tensor,
    kv: StoredKV,
    blocks: QueryBlocks,
    plan: SparsePlan,
) -> tuple[Tensor, Tensor]:
    """The shares of columns [Hkv, N, S] from real keys: those of their most promising sub-pages.

    HiP's own last level, which descends to real keys (docs/algorithm.md, "the second look").
    Reads ``second_look`` times the budget's keys. A page of which nothing was read scores -inf.
    What was read also tells how much too high each row's estimates are: [Hkv, N, M, 1], the mean
    of true minus estimated logits of the sub-pages, where that is negative.
    """
    logits = context.logits
    count = len(logits.parts)
    tokens = PAGE_SIZE // count
    rest = mass if logits.spread is None else mass - logits.spread
    promise = torch.stack([best_of_rows(part - rest, blocks) for part in logits.parts], -1)
    size = promise.shape[2]
    promise = promise.masked_fill_(~candidates.unsqueeze(-1), NEVER).flatten(2)  # [Hkv, N, S * L]
    wanted = min(plan.second_look * plan.budget_pages, size) * count
    promises, places = promise.topk(wanted)
    column, part = places // count, places % count
    page = context.page.expand(*column.shape[:2], -1).gather(2, column)
    slots = lookup(blocks.table, page) * PAGE_SIZE + part * tokens
    found = soft_cap(kv.scores(query, slots, tokens), plan.logit_cap)
    found = found.view(*found.shape[:3], wanted, tokens)
    absent = (promises == NEVER).unsqueeze(2)
    true = found.logsumexp(-1)  # [Hkv, N, M, wanted]

    excess = (true - estimates(logits, column, part)).masked_fill_(absent, 0)
    excess = excess.sum(-1, keepdim=True) / (~absent).sum(-1, keepdim=True).clamp(min=1)

    # what was read of a page adds up, in each row relative to the row's best
    seen = (true - mass).masked_fill_(absent, NEVER)
    top = seen.amax(-1, keepdim=True).clamp(min=LEAST)
    share = seen.new_zeros((*seen.shape[:3], size))
    share.scatter_add_(3, column.unsqueeze(2).expand_as(seen), (seen - top).exp_())
    return best_of_rows(share.log_().add_(top), blocks), excess.clamp_(max=0)


def estimates(logits: PageLogits, column: Tensor, part: Tensor) -> Tensor:
    """The estimated logits [Hkv, N, M, K] of sub-pages: column and part are [Hkv, N, K]."""
    at = column.unsqueeze(2).expand(-1, -1, logits.page.shape[2], -1)
    found = torch.full(at.shape, math.log(PAGE_SIZE / len(logits.parts)), device=at.device)
    for number, mean in enumerate(logits.parts):
        found += mean.gather(3, at).where((part == number).unsqueeze(2), 0)
    return found if logits.spread is None else found + logits.spread.gather(3, at)


def best(score: Tensor, candidates: Tensor, plan: SparsePlan) -> Tensor:
    """score [Hkv, N, S] -> columns [Hkv, N, budget], best first; -1 where there are fewer."""
    # a candidate without any estimated mass still comes before what is no candidate
    score = score.clamp(min=LEAST).masked_fill(~candidates, NEVER)
    found, columns = score.topk(min(plan.budget_pages, score.shape[-1]))
    columns = columns.where(found > NEVER, -1)
    return pad(columns, (0, plan.budget_pages - columns.shape[-1]), value=-1)


def enough(
    columns: Tensor,
    context: Context,
    mass: Tensor,
    candidates: Tensor,
    blocks: QueryBlocks,
    top_p: float,
) -> Tensor:
    """Of columns [Hkv, N, K], best first, as many as hold ``top_p`` of the mass for every row.

    Sink and window count as held. The others become -1.
    """
    share = (context.logits.page - mass).exp_()  # [Hkv, N, M, S]
    fixed = (context.page >= 0) & ~candidates
    held = share.masked_fill(~fixed.unsqueeze(2), 0).sum(-1, keepdim=True)
    at = columns.clamp(min=0).unsqueeze(2).expand(-1, -1, share.shape[2], -1)
    chosen = share.gather(3, at).masked_fill_((columns < 0).unsqueeze(2), 0)
    before = held + chosen.cumsum(-1) - chosen
    wanting = best_of_rows(top_p - before, blocks) > 0
    return columns.where(wanting, -1)
