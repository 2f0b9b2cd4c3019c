"""Which pages a query block attends exactly, and what the others are estimated to weigh.

Everything here works in *local* page numbers: positions in a list of S pages that holds every
page the blocks can see (a run of the pool, or the pages of the request). A table [N | 1, P]
leads from logical pages to local ones. Heads come first, so that one matrix product serves all
blocks of a KV head.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from hip_kernels.layout import (
    PAGE_SIZE,
    PagedKV,
    QueryBlocks,
    Remainder,
    Selection,
    SparsePlan,
    Summaries,
)

NEVER = float("-inf")
LEAST = torch.finfo(torch.float32).min


def page_logits(query: Tensor, summaries: Summaries, remainder: Remainder) -> Tensor:
    """What each page weighs for each query row, as the logit of one key.

    query [Hkv, N, M, D], scaled -> [Hkv, N, M, S], the estimated log of the sum of exp over the
    page's keys: the log-sum-exp over its means, each of n tokens, of ``q.mean + log n``, plus the
    guarded second cumulant of the keys about those means. The same number chooses pages and
    weighs the pruned ones.
    """
    heads, blocks, rows, width = query.shape
    flat = query.reshape(heads, blocks * rows, width)
    parts = [flat @ mean.transpose(1, 2) for mean in summaries.mean.unbind(1)]
    weight = _log_sum_exp(parts).add_(math.log(PAGE_SIZE / len(parts)))
    if remainder not in ("mean", "none"):
        weight += spread(flat, summaries.sigma, remainder)
    return weight.view(heads, blocks, rows, -1)


def _log_sum_exp(parts: list[Tensor]) -> Tensor:
    """Element-wise over a few tensors: torch is slow at reducing a short axis."""
    if len(parts) == 1:
        return parts[0]
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


def context_mask(blocks: QueryBlocks, pages: int) -> Tensor:
    """[N, S]: the local pages that lie wholly before each block."""
    assert blocks.local is not None
    table = blocks.local.table
    before = torch.arange(table.shape[1], device=table.device) < blocks.page.unsqueeze(1)  # [N, P]
    return mark(table.expand(len(blocks), -1), before, pages)


def mark(index: Tensor, valid: Tensor, size: int) -> Tensor:
    """A bool mask [..., size] that is true at the valid ones of index [..., K]."""
    mask = torch.zeros(*index.shape[:-1], size + 1, dtype=torch.bool, device=index.device)
    # what is not valid lands in a column that is thrown away
    return mask.scatter_(-1, index.where(valid, size), True)[..., :size]


def select(
    query: Tensor,
    logits: Tensor,
    kv: PagedKV,
    blocks: QueryBlocks,
    context: Tensor,
    plan: SparsePlan,
) -> Selection:
    """Choose pages by their share of the softmax mass, estimated and then, if asked, looked at.

    query [Hkv, N, M, D] scaled; logits [Hkv, N, M, S] of ``page_logits``; context [N, S].
    Logits of different heads and rows are not comparable: a page scores its logit minus the
    row's log-sum-exp over all visible pages, and then the maximum over the rows of the block
    and the heads of the group.
    """
    assert blocks.local is not None
    heads, count = logits.shape[:2]
    visible = logits.masked_fill(~context[:, None], NEVER)
    mass = visible.logsumexp(-1, keepdim=True)  # [Hkv, N, M, 1]
    score = _over_rows(visible.sub_(mass), blocks)
    score = score.gather(2, blocks.local.table.expand(heads, count, -1))  # [Hkv, N, P] logical
    score = score.transpose(0, 1)
    if plan.second_look == 1 or blocks.tokens.shape[1] > 1:
        return choose(score, blocks.page, plan)
    wide = replace(plan, budget_pages=min(plan.second_look * plan.budget_pages, score.shape[2]))
    candidates = choose(score, blocks.page, wide).chosen  # [N, Hkv, C]
    seen = look(query, mass, kv, blocks, candidates.transpose(0, 1)).transpose(0, 1)
    # what was not looked at cannot be chosen before what was
    seen = seen.clamp(min=LEAST).where(candidates >= 0, NEVER)
    looked = torch.full((*score.shape[:2], score.shape[2] + 1), NEVER, device=score.device)
    looked.scatter_(2, candidates.where(candidates >= 0, score.shape[2]), seen)
    return choose(looked[..., :-1], blocks.page, plan)


def look(
    query: Tensor, mass: Tensor, kv: PagedKV, blocks: QueryBlocks, candidates: Tensor
) -> Tensor:
    """The true shares of candidate pages [Hkv, N, C], from their keys -> [Hkv, N, C].

    HiP's own last level, which descends to real keys (docs/algorithm.md, "the second look").
    """
    keys = kv.keys(lookup(blocks.table, candidates))  # [Hkv, N, C * 64, D]
    logits = query @ keys.transpose(-1, -2)
    logits = logits.view(*logits.shape[:3], -1, PAGE_SIZE)
    return _over_rows(logits.logsumexp(-1) - mass, blocks)


def _over_rows(share: Tensor, blocks: QueryBlocks) -> Tensor:
    """share [Hkv, N, M, S] (overwritten) -> [Hkv, N, S], the best of the real rows."""
    padding = blocks.position < 0  # [N, R]
    if bool(padding.any()):
        padding = padding.repeat_interleave(share.shape[2] // padding.shape[1], 1)
        share.masked_fill_(padding.unsqueeze(-1), NEVER)
    return share.amax(2)


def lookup(table: Tensor, pages: Tensor) -> Tensor:
    """Logical pages [Hkv, N, K] through table [N | 1, P]; padding (-1) reads as page 0."""
    return table.expand(*pages.shape[:2], -1).gather(2, pages.clamp(min=0))


def choose(score: Tensor, page: Tensor, plan: SparsePlan) -> Selection:
    """score [N, Hkv, P] by logical page, page [N] of the block -> sink, best, window, own."""
    heads, pages = score.shape[1:]
    logical = torch.arange(pages, device=score.device)
    window_start = page - plan.window_pages  # [N]
    candidate = (logical >= plan.sink_pages) & (logical < window_start[:, None])  # [N, P]
    candidate = candidate[:, None].expand(-1, heads, -1)
    # a candidate without any estimated mass still comes before what is no candidate
    score = score.clamp(min=LEAST).masked_fill(~candidate, NEVER)
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
