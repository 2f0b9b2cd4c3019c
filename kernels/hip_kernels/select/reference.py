"""Which pages, or sub-pages, a query block attends exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from hip_kernels.layout import PAGE_SIZE, QueryBlocks, SparsePlan, soft_cap
from hip_kernels.select.weigh import (
    LEAST,
    NEVER,
    Context,
    PageLogits,
    best_of_rows,
    lookup,
    mark,
)
from hip_kernels.stored import StoredKV


def select(
    query: Tensor, context: Context, kv: StoredKV, blocks: QueryBlocks, plan: SparsePlan
) -> tuple[Tensor, Tensor, Context]:
    """Choose by the share of the softmax mass, estimated and then, if asked, looked at.

    query [Hkv, N, M, D] scaled. Logits of different heads and rows are not comparable: a page
    scores its logit minus the row's log-sum-exp over all that is visible, and then the maximum
    over the rows of the block and the heads of the group. Returns logical pages [Hkv, N, budget],
    or, where blocks of one row look at sub-pages and choose among these, ``Choice.entries``, in
    order, -1 for none; what each row's estimates were found to be wrong by, [Hkv, N, M, 1], to be
    added to them; and the context with what is known of it now.
    """
    mass = context.mass()
    candidates = context.candidates(blocks.page, plan)
    correction = torch.zeros_like(mass)
    seen, parts = None, plan.parts
    if plan.second_look:
        seen = look(query, context, mass, candidates, kv, blocks, plan)
        score, correction = seen.score(mass, blocks, parts), seen.correction
    else:
        score = best_of_rows(context.logits.page - mass, blocks)
    columns = best(score, candidates.repeat_interleave(parts, -1), plan.budget_pages * parts)
    if plan.top_p < 1:
        share = (context.logits.page - mass).exp_()  # [Hkv, N, M, S]
        fixed = (context.page >= 0) & ~candidates
        held = share.masked_fill(~fixed.unsqueeze(2), 0).sum(-1, keepdim=True)
        if parts > 1:
            assert seen is not None
            share = (seen.estimated - mass).exp_()
        columns = enough(columns, share, held, blocks, plan.top_p)
    if seen is not None and plan.remainder != "none":
        context = replace(context, logits=seen.known(columns, parts))
    return context.entries(columns, parts), correction, context


@dataclass(frozen=True)
class Look:
    """Sub-pages of which the keys were read: K of them, as column * L + part."""

    logits: PageLogits  # as they were estimated
    estimated: Tensor  # [Hkv, N, M, S * L] all sub-pages, as they were estimated
    at: Tensor  # [Hkv, N, K]
    absent: Tensor  # [Hkv, N, 1, K]: there were fewer
    true: Tensor  # [Hkv, N, M, K]: the log of the sum of exp over a sub-page's keys
    correction: Tensor  # [Hkv, N, M, 1]

    def score(self, mass: Tensor, blocks: QueryBlocks, parts: int) -> Tensor:
        """The best shares [Hkv, N, S * parts] of what was read; -inf where nothing was.

        What was read of a page adds up, in each row relative to the row's best.
        """
        share = (self.true - mass).masked_fill_(self.absent, NEVER)
        count = len(self.logits.parts)
        size = self.logits.page.shape[-1] * parts
        if parts == count:
            best = share.new_full((*self.at.shape[:2], size), NEVER)
            return best.scatter_(2, self.at, best_of_rows(share, blocks))
        top = share.amax(-1, keepdim=True).clamp(min=LEAST)
        found = share.new_zeros((*share.shape[:3], size))
        at = (self.at // count).unsqueeze(2).expand_as(share)
        found.scatter_add_(3, at, (share - top).exp_())
        return best_of_rows(found.log_().add_(top), blocks)

    def known(self, columns: Tensor, parts: int) -> PageLogits:
        """What pages weigh by what was read of them, without sub-pages that are chosen.

        Columns [Hkv, N, K'] of the choice, in parts of pages. A sub-page that was read weighs what
        it was found to, if that is less than was estimated: where it is more, few of its keys are
        heavy, and of these the mean value says little. The correction is not in it yet.
        """
        at = self.at.unsqueeze(2).expand_as(self.true)
        before = self.estimated.gather(3, at)
        found = torch.minimum(before, self.true) - self.correction
        logit = self.estimated.scatter(3, at, before.where(self.absent, found))
        if parts > 1:
            chosen = mark(columns, columns >= 0, logit.shape[-1])
            logit.masked_fill_(chosen.unsqueeze(2), NEVER)
        page = logit.view(*self.logits.page.shape, -1).logsumexp(-1)
        return replace(self.logits, page=page)


def look(
    query: Tensor,
    context: Context,
    mass: Tensor,
    candidates: Tensor,
    kv: StoredKV,
    blocks: QueryBlocks,
    plan: SparsePlan,
) -> Look:
    """Read the real keys of the most promising sub-pages of columns [Hkv, N, S].

    HiP's own last level, which descends to real keys (docs/algorithm.md, "the second look"):
    ``second_look`` times the budget's keys. They tell how much too high each row's estimates are:
    the mean of true minus estimated logits, where that is negative.
    """
    logits = context.logits
    count = len(logits.parts)
    tokens = PAGE_SIZE // count
    estimated = sub_pages(logits).flatten(3)
    promise = best_of_rows(estimated - mass, blocks)
    size = logits.page.shape[-1]
    promise = promise.masked_fill_(~candidates.repeat_interleave(count, -1), NEVER)
    wanted = min(plan.second_look * plan.budget_pages, size) * count
    promises, at = promise.topk(wanted)
    page = context.page.expand(*at.shape[:2], -1).gather(2, at // count)
    slots = lookup(blocks.table, page) * PAGE_SIZE + at % count * tokens
    found = soft_cap(kv.scores(query, slots, tokens), plan.logit_cap)
    true = found.view(*found.shape[:3], wanted, tokens).logsumexp(-1)
    absent = (promises == NEVER).unsqueeze(2)
    excess = true - estimated.gather(3, at.unsqueeze(2).expand_as(true))
    excess = excess.masked_fill_(absent, 0).sum(-1, keepdim=True)
    excess /= (~absent).sum(-1, keepdim=True).clamp(min=1)
    return Look(logits, estimated, at, absent, true, excess.clamp_(max=0))


def sub_pages(logits: PageLogits) -> Tensor:
    """[Hkv, N, M, S, L]: what sub-pages weigh, as pages do."""
    found = logits.parts.movedim(0, -1) + math.log(PAGE_SIZE / len(logits.parts))
    return found if logits.spread is None else found + logits.spread.unsqueeze(-1)


def best(score: Tensor, candidates: Tensor, count: int) -> Tensor:
    """score [Hkv, N, S] -> columns [Hkv, N, count], best first; -1 where there are fewer."""
    # a candidate without any estimated mass still comes before what is no candidate
    score = score.clamp(min=LEAST).masked_fill(~candidates, NEVER)
    found, columns = score.topk(min(count, score.shape[-1]))
    columns = columns.where(found > NEVER, -1)
    return pad(columns, (0, count - columns.shape[-1]), value=-1)


def enough(
    columns: Tensor, share: Tensor, held: Tensor, blocks: QueryBlocks, top_p: float
) -> Tensor:
    """Of columns [Hkv, N, K], best first, as many as hold ``top_p`` of the mass for every row.

    share [Hkv, N, M, S] of the mass; held [Hkv, N, M, 1] of sink and window. The others become -1.
    """
    at = columns.clamp(min=0).unsqueeze(2).expand(-1, -1, share.shape[2], -1)
    chosen = share.gather(3, at).masked_fill_((columns < 0).unsqueeze(2), 0)
    before = held + chosen.cumsum(-1) - chosen
    wanting = best_of_rows(top_p - before, blocks) > 0
    return columns.where(wanting, -1)
