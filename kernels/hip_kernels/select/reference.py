"""Which pages a query block attends exactly, and what the others are estimated to weigh.

Everything here works in *local* page numbers: positions in a list of S pages that holds every
page the blocks can see (a run of the pool, or the pages of the request). A table [N | 1, P]
leads from logical pages to local ones. Heads come first, so that one matrix product serves all
blocks of a KV head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from hip_kernels.layout import (
    PAGE_SIZE,
    SUB_PAGE_SIZE,
    LocalPages,
    QueryBlocks,
    Remainder,
    Selection,
    SparsePlan,
    Summaries,
)

NEVER = float("-inf")


@dataclass(frozen=True)
class PageLogits:
    """What each page weighs for each query row, as the logit of one key."""

    select: Tensor  # [Hkv, N, M, S] for choosing pages
    remainder: Tensor | None  # [Hkv, N, M, S] for estimating pruned pages; None leaves them out


def page_logits(query: Tensor, summaries: Summaries, plan: SparsePlan) -> PageLogits:
    """query [Hkv, N, M, D], scaled -> the estimated log of the sum of exp over each page's keys.

    A pruned page of n tokens is one key of logit ``q.mean + guard(q, sigma) + log n`` (the
    second-order cumulant of its log-sum-exp, guarded); for choosing, the log-sum-exp of its
    sub-page means is sharper where a needle is narrower than a page.
    """
    heads, blocks, rows, width = query.shape
    flat = query.reshape(heads, blocks * rows, width)

    def unflat(logits: Tensor) -> Tensor:
        return logits.view(heads, blocks, rows, -1)

    if summaries.sub_mean is None or not plan.sub_page_means:
        weight = page_weight(flat, flat @ summaries.mean.transpose(1, 2), summaries, plan)
        return PageLogits(unflat(weight), None if plan.remainder == "none" else unflat(weight))
    parts = [flat @ part.transpose(1, 2) for part in summaries.sub_mean.unbind(1)]
    sharp = unflat(_log_sum_exp(parts).add_(math.log(SUB_PAGE_SIZE)))
    if plan.remainder == "none":
        return PageLogits(sharp, None)
    # the mean of the sub-page means is the page's mean: no product of its own
    mean = torch.stack(parts).mean(0)
    return PageLogits(sharp, unflat(page_weight(flat, mean, summaries, plan)))


def page_weight(query: Tensor, mean: Tensor, summaries: Summaries, plan: SparsePlan) -> Tensor:
    """query [Hkv, M, D], mean logits [Hkv, M, S] (overwritten) -> logits of whole pages."""
    weight = mean.add_(math.log(PAGE_SIZE))
    if plan.remainder in ("mean", "none"):
        return weight
    return weight.add_(spread(query, summaries.sigma, plan.remainder))


def _log_sum_exp(parts: list[Tensor]) -> Tensor:
    """Element-wise over a few tensors: torch is slow at reducing a short axis."""
    top = parts[0]
    for part in parts[1:]:
        top = torch.maximum(top, part)
    total = parts[0].sub(top).exp_()
    for part in parts[1:]:
        total += part.sub(top).exp_()
    return total.log_().add_(top)


def spread(query: Tensor, sigma: Tensor, kind: Remainder) -> Tensor:
    """What the spread of a page's keys adds to its logit: query [Hkv, M, D], sigma [Hkv, S, D].

    ``quadratic`` is the second cumulant ``Q = 1/2 q^2 . sigma^2``, which over-estimates where a
    rotary pair is fast and carries a large constant. ``log_cosh`` is the exact log-mean-exp of a
    two-point variable of that deviation. ``harmonic``, ``Q L / (Q + L)`` with
    ``L = |q| . sigma``, agrees with both to second order, grows linearly, and is two matrix
    products (docs/algorithm.md, "the guard").
    """
    if kind == "log_cosh":
        x = query.abs().unsqueeze(2) * sigma.unsqueeze(1)  # [Hkv, M, S, D]
        return (x + torch.log1p(torch.exp(-2 * x)) - math.log(2)).sum(-1)
    quadratic = (0.5 * query.square()) @ sigma.square().transpose(1, 2)
    if kind == "quadratic":
        return quadratic
    linear = query.abs() @ sigma.transpose(1, 2)
    # where both are 0 so is their product: the tiny constant only keeps 0 / 0 away
    total = (quadratic + linear).add_(torch.finfo(linear.dtype).tiny)
    return quadratic.mul_(linear).div_(total)


def context_mask(blocks: QueryBlocks, local: LocalPages, pages: int) -> Tensor:
    """[N, S]: the local pages that lie wholly before each block."""
    table = local.table
    before = torch.arange(table.shape[1], device=table.device) < blocks.page.unsqueeze(1)  # [N, P]
    return mark(table.expand(len(blocks), -1), before, pages)


def mark(index: Tensor, valid: Tensor, size: int) -> Tensor:
    """A bool mask [..., size] that is true at the valid ones of index [..., K]."""
    mask = torch.zeros(*index.shape[:-1], size + 1, dtype=torch.bool, device=index.device)
    # what is not valid lands in a column that is thrown away
    return mask.scatter_(-1, index.where(valid, size), True)[..., :size]


def select(
    logits: Tensor, blocks: QueryBlocks, local: LocalPages, context: Tensor, plan: SparsePlan
) -> Selection:
    """Choose pages by their share of the estimated softmax mass.

    logits [Hkv, N, M, S]; context [N, S]. Logits of different heads and rows are not comparable:
    a page scores its logit minus the row's log-sum-exp over all visible pages, and then the
    maximum over the rows of the block and the heads of the group.
    """
    heads, count, rows = logits.shape[:3]
    visible = logits.masked_fill(~context[:, None], NEVER)
    share = visible.sub_(visible.logsumexp(-1, keepdim=True))
    padding = blocks.position < 0  # [N, R]
    if bool(padding.any()):
        padding = padding.repeat_interleave(rows // padding.shape[1], 1)
        share = share.masked_fill_(padding.unsqueeze(-1), NEVER)
    score = share.amax(2).gather(2, local.table.expand(heads, count, -1))  # [Hkv, N, P] logical
    return choose(score.transpose(0, 1), blocks.page, plan)


def choose(score: Tensor, page: Tensor, plan: SparsePlan) -> Selection:
    """score [N, Hkv, P] by logical page, page [N] of the block -> sink, best, window, own."""
    heads, pages = score.shape[1:]
    logical = torch.arange(pages, device=score.device)
    window_start = page - plan.window_pages  # [N]
    candidate = (logical >= plan.sink_pages) & (logical < window_start[:, None])  # [N, P]
    candidate = candidate[:, None].expand(-1, heads, -1)
    # a candidate without any estimated mass still comes before what is no candidate
    score = score.clamp(min=torch.finfo(score.dtype).min).masked_fill(~candidate, NEVER)
    chosen = score.topk(min(plan.budget_pages, pages)).indices
    chosen = chosen.where(candidate.gather(2, chosen), pages).sort(-1).values
    chosen = chosen.where(chosen < pages, -1)
    chosen = pad(chosen, (0, plan.budget_pages - chosen.shape[-1]), value=-1)
    sink = torch.arange(plan.sink_pages, device=score.device)
    sink = sink.where(sink < page[:, None], -1)  # [N, sinks]
    window = page[:, None] - torch.arange(plan.window_pages, -1, -1, device=score.device)
    # a block inside the sink still attends to its own page
    inside = (window >= plan.sink_pages) | (window == page[:, None])
    window = window.where(inside, -1)  # [N, window + 1]

    def each_head(pages: Tensor) -> Tensor:
        return pages[:, None].expand(-1, heads, -1)

    found = torch.cat([each_head(sink), chosen, each_head(window)], -1)
    return Selection(found, plan.sink_pages, plan.window_pages)
