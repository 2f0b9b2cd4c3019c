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
    PagedKV,
    QueryBlocks,
    Remainder,
    Selection,
    SparsePlan,
    Summaries,
    products,
)

NEVER = float("-inf")
LEAST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class PageLogits:
    """What each page weighs for each query row, as the logit of one key."""

    page: Tensor  # [Hkv, N, M, S] the estimated log of the sum of exp over the page's keys
    parts: list[Tensor]  # L x [Hkv, N, M, S]: q . mean of each sub-page
    spread: Tensor | None  # [Hkv, N, M, S] the guarded second cumulant about those means


def page_logits(query: Tensor, summaries: Summaries, remainder: Remainder) -> PageLogits:
    """Weigh the pages of ``summaries`` for query [Hkv, N, M, D], scaled.

    The log-sum-exp over a page's means, each of n tokens, of ``q.mean + log n``, plus the guarded
    second cumulant of the keys about those means. The same number chooses pages and weighs the
    pruned ones.
    """
    heads, blocks, rows, width = query.shape
    flat = query.reshape(heads, blocks * rows, width)
    shape = (heads, blocks, rows, -1)
    parts = [products(flat, mean).view(shape) for mean in summaries.mean.unbind(1)]
    weight = _log_sum_exp(parts).add_(math.log(PAGE_SIZE / len(parts)))
    if remainder in ("mean", "none"):
        return PageLogits(weight, parts, None)
    guarded = spread(flat, summaries.sigma, remainder).view(shape)
    return PageLogits(weight.add_(guarded), parts, guarded)


def _log_sum_exp(parts: list[Tensor]) -> Tensor:
    """Element-wise over a few tensors: torch is slow at reducing a short axis."""
    if len(parts) == 1:
        return parts[0].clone()
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
    # head by head through one buffer, so that the squares stay in the cache
    square = torch.empty_like(sigma[:1])
    squares = [
        products(0.5 * q.square()[None], torch.square(s[None], out=square))
        for q, s in zip(query, sigma, strict=True)
    ]
    quadratic = torch.cat(squares)
    if kind == "quadratic":
        return quadratic
    linear = products(query.abs(), sigma)
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
    logits: PageLogits,
    kv: PagedKV,
    blocks: QueryBlocks,
    context: Tensor,
    plan: SparsePlan,
) -> tuple[Selection, Tensor | None]:
    """Choose pages by their share of the softmax mass, estimated and then, if asked, looked at.

    query [Hkv, N, M, D] scaled; context [N, S]. Logits of different heads and rows are not
    comparable: a page scores its logit minus the row's log-sum-exp over all visible pages, and
    then the maximum over the rows of the block and the heads of the group. After a look also
    what the row's estimates are wrong by, [Hkv, N, M, 1], to be added to them.
    """
    visible = logits.page.masked_fill(~context[:, None], NEVER)
    mass = visible.logsumexp(-1, keepdim=True)  # [Hkv, N, M, 1]
    correction = None
    if plan.second_look and blocks.tokens.shape[1] == 1:
        score, correction = look(query, logits, mass, kv, blocks, plan)
    else:
        score = by_position(best_of_rows(visible.sub_(mass), blocks), blocks)
    return choose(score.transpose(0, 1), blocks.page, plan), correction


def look(
    query: Tensor,
    logits: PageLogits,
    mass: Tensor,
    kv: PagedKV,
    blocks: QueryBlocks,
    plan: SparsePlan,
) -> tuple[Tensor, Tensor]:
    """The shares of pages [Hkv, N, P] from real keys: those of their most promising sub-pages.

    HiP's own last level, which descends to real keys (docs/algorithm.md, "the second look").
    Reads ``second_look`` times the budget's keys. A page of which nothing was read scores -inf.
    What was read also tells how much too high each row's estimates are: [Hkv, N, M, 1], the mean
    of true minus estimated logits of the sub-pages, where that is negative.
    """
    count = len(logits.parts)
    tokens = PAGE_SIZE // count
    rest = mass if logits.spread is None else mass - logits.spread
    promises = [
        by_position(best_of_rows(part - rest, blocks), blocks) for part in logits.parts
    ]  # L x [Hkv, N, P]
    promise = torch.stack(promises, -1)
    pages = promise.shape[2]
    closed = ~candidate_pages(blocks.page, pages, plan)  # [N, P]
    promise = promise.masked_fill_(closed[:, :, None], NEVER).flatten(2)  # [Hkv, N, P * L]
    wanted = min(plan.second_look * plan.budget_pages, pages) * count
    best, places = promise.topk(wanted)
    page, part = places // count, places % count
    slots = lookup(blocks.table, page) * PAGE_SIZE + part * tokens
    found = kv.scores(query, slots, tokens)
    found = found.view(*found.shape[:3], wanted, tokens)
    absent = (best == NEVER).unsqueeze(2)
    true = found.logsumexp(-1)  # [Hkv, N, M, wanted]

    excess = (true - estimates(logits, page, part, blocks)).masked_fill_(absent, 0)
    excess = excess.sum(-1, keepdim=True) / (~absent).sum(-1, keepdim=True).clamp(min=1)

    # what was read of a page adds up, in each row relative to the row's best
    seen = (true - mass).masked_fill_(absent, NEVER)
    top = seen.amax(-1, keepdim=True).clamp(min=LEAST)
    share = seen.new_zeros((*seen.shape[:3], pages))
    share.scatter_add_(3, page.unsqueeze(2).expand_as(seen), (seen - top).exp_())
    return best_of_rows(share.log_().add_(top), blocks), excess.clamp_(max=0)


def estimates(logits: PageLogits, page: Tensor, part: Tensor, blocks: QueryBlocks) -> Tensor:
    """The estimated logits [Hkv, N, M, K] of sub-pages: page and part are [Hkv, N, K]."""
    assert blocks.local is not None
    local = lookup(blocks.local.table, page).unsqueeze(2)
    local = local.expand(-1, -1, logits.page.shape[2], -1)
    found = torch.full(local.shape, math.log(PAGE_SIZE / len(logits.parts)), device=local.device)
    for number, mean in enumerate(logits.parts):
        found += mean.gather(3, local).where((part == number).unsqueeze(2), 0)
    return found if logits.spread is None else found + logits.spread.gather(3, local)


def by_position(score: Tensor, blocks: QueryBlocks) -> Tensor:
    """score [Hkv, N, S] of local pages -> [Hkv, N, P] of logical ones."""
    assert blocks.local is not None
    return score.gather(2, blocks.local.table.expand(*score.shape[:2], -1))


def best_of_rows(share: Tensor, blocks: QueryBlocks) -> Tensor:
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
    candidate = candidate_pages(page, pages, plan)[:, None].expand(-1, heads, -1)
    # a candidate without any estimated mass still comes before what is no candidate
    score = score.clamp(min=LEAST).masked_fill(~candidate, NEVER)
    chosen = score.topk(min(plan.budget_pages, pages)).indices
    chosen = chosen.where(candidate.gather(2, chosen), pages).sort(-1).values
    chosen = chosen.where(chosen < pages, -1)
    chosen = pad(chosen, (0, plan.budget_pages - chosen.shape[-1]), value=-1)
    return with_fixed_pages(chosen, page, plan)


def with_fixed_pages(chosen: Tensor, page: Tensor, plan: SparsePlan) -> Selection:
    """chosen [N, Hkv, budget], page [N] of the block -> sink, chosen, window, own."""
    sink = torch.arange(plan.sink_pages, device=chosen.device)
    sink = sink.where(sink < page[:, None], -1)  # [N, sinks]
    window = page[:, None] - torch.arange(plan.window_pages, -1, -1, device=chosen.device)
    # a block inside the sink still attends to its own page
    inside = (window >= plan.sink_pages) | (window == page[:, None])
    window = window.where(inside, -1)  # [N, window + 1]

    def each_head(pages: Tensor) -> Tensor:
        return pages[:, None].expand(-1, chosen.shape[1], -1)

    found = torch.cat([each_head(sink), chosen, each_head(window)], -1)
    return Selection(found, plan.sink_pages, plan.window_pages)


def candidate_pages(page: Tensor, pages: int, plan: SparsePlan) -> Tensor:
    """[N, P]: the pages between the sink and the window of blocks at ``page`` [N]."""
    logical = torch.arange(pages, device=page.device)
    return (logical >= plan.sink_pages) & (logical < (page - plan.window_pages)[:, None])
