"""What the context weighs for each query row: page by page, and by nodes where it is long.

Everything here works in *columns*: a column is a page that some query block can see, or a node of
``NODE_PAGES`` pages. Heads come first, so that one matrix product serves all blocks of a KV head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from hip_kernels.layout import (
    NODE_PAGES,
    PAGE_SIZE,
    LocalPages,
    QueryBlocks,
    Remainder,
    SparsePlan,
    Summaries,
    products,
    soft_cap,
)

NEVER = float("-inf")
LEAST = torch.finfo(torch.float32).min
# logits of a KV head that rows of a prompt weigh at a time: some such tensors fit in a cache
TILE_LOGITS = 1 << 16


@dataclass(frozen=True)
class PageLogits:
    """What pages weigh for query rows, each as the logit of one key."""

    page: Tensor  # [..., S] the estimated log of the sum of exp over the page's keys
    parts: Tensor  # [L, ..., S] q . mean of each sub-page; L is 0 where none is looked at
    spread: Tensor | None  # [..., S] the guarded second cumulant about those means

    def view(self, *shape: int) -> PageLogits:
        spread = None if self.spread is None else self.spread.view(shape)
        return PageLogits(self.page.view(shape), self.parts.view(-1, *shape), spread)

    @classmethod
    def joined(
        cls, found: Sequence[PageLogits], join: Callable[[list[Tensor]], Tensor]
    ) -> PageLogits:
        """``join`` counts dimensions from the last, for ``parts`` has one more in front."""
        spreads = [of.spread for of in found if of.spread is not None]
        return cls(
            join([of.page for of in found]),
            join([of.parts for of in found]),
            join(spreads) if spreads else None,
        )


@dataclass(frozen=True)
class Nodes:
    """What is not weighed page by page."""

    logit: Tensor  # [Hkv, N, M, J]; -inf where its pages are columns, or none of the block's
    value: Tensor  # [Hkv, 1, J, Dv]


@dataclass(frozen=True)
class Context:
    """The pages before query blocks: columns of pages, and the nodes that hold all others."""

    page: Tensor  # [Hkv | 1, N, S] the logical page of each column; -1: none before the block
    logits: PageLogits  # [Hkv, N, M, S]
    value: Tensor  # [Hkv, N | 1, S, Dv]
    nodes: Nodes | None = None

    def mass(self) -> Tensor:
        """[Hkv, N, M, 1]: the log-sum-exp over all that is visible to each row."""
        # torch.where is twice as fast on a CPU as masked_fill
        mass = log_mass(torch.where((self.page >= 0).unsqueeze(2), self.logits.page, NEVER))
        if self.nodes is not None:
            mass = mass.logaddexp(log_mass(self.nodes.logit))
        return mass.clamp(min=LEAST)

    def columns(self, pages: Tensor, size: int) -> Tensor:
        """The columns [Hkv, N, K] of logical pages, all below ``size``; -1 is none."""
        heads, blocks, _ = pages.shape
        here = self.page.expand(heads, -1, -1)
        column = torch.full((heads, blocks, size + 1), -1, device=here.device)
        number = torch.arange(here.shape[2], device=here.device).expand_as(here)
        # what is no page lands in the last place, which is then looked up for padding
        column.scatter_(2, here.where(here >= 0, size), number)
        column[..., -1] = -1
        return column.gather(2, pages.where(pages >= 0, size))

    def candidates(self, own: Tensor, plan: SparsePlan) -> Tensor:
        """[Hkv | 1, N, S]: the pages between sink and window of the blocks in ``own`` [N]."""
        return (self.page >= plan.sink_pages) & (self.page < (own - plan.window_pages)[:, None])

    def entries(self, columns: Tensor, parts: int) -> Tensor:
        """Columns [Hkv, N, K], in parts -> ``Choice.entries``; padding (-1) goes last."""
        last = torch.iinfo(torch.int64).max
        found = self.page.expand(*columns.shape[:2], -1).gather(2, columns.clamp(min=0) // parts)
        found = found * parts + columns % parts
        found = found.where(columns >= 0, last).sort(-1).values
        return found.where(found < last, -1)

    def remainder(
        self, columns: Tensor, own: Tensor, plan: SparsePlan
    ) -> list[tuple[Tensor, Tensor]]:
        """What is left when ``columns`` [Hkv, N, K] are exact: logits [Hkv, N, M, S], values."""
        chosen = mark(columns, columns >= 0, self.page.shape[-1])
        pruned = self.candidates(own, plan) & ~chosen
        found = [(torch.where(pruned.unsqueeze(2), self.logits.page, NEVER), self.value)]
        if self.nodes is not None:
            found.append((self.nodes.logit, self.nodes.value))
        return found


def weigh_pages(
    query: Tensor, near: Summaries, local: LocalPages, blocks: QueryBlocks, plan: SparsePlan
) -> Context:
    """A column for every page of ``near``, the summaries of ``local``: query [Hkv, N, M, D]."""
    shape = (*query.shape[:3], near.pages)
    logits = weigh(query.flatten(1, 2), near, blocks, plan).view(*shape)
    page = numbers(local, blocks.page, near.pages)
    return Context(page[None], logits, near.value[:, None])


def weigh_nodes(
    query: Tensor,
    summaries: Summaries,
    near: Summaries,
    local: LocalPages,
    blocks: QueryBlocks,
    plan: SparsePlan,
    chosen: Tensor | None,
) -> Context:
    """A column for every page of the ``beam`` heaviest nodes, and the others as they are.

    query [Hkv, N, M, D]; the rows of a block and the heads of a group share a beam. ``near`` are
    summaries of nodes, ``local`` leads to them. A node that reaches into the sink or the window is
    represented by its pages. Pages that are ``chosen`` already, [Hkv, N, K], come with their
    nodes, however light these are.
    """
    heads = len(query)
    shape = (*query.shape[:3], near.pages)
    logit = weigh(query.flatten(1, 2), near, blocks, plan).view(*shape).page
    first, end = node_range(blocks.page, plan)
    node = numbers(local, end, near.pages)  # [N, J]
    node = node.where(node >= first, -1)
    # a summary counts for 64 keys, a node holds more
    logit += torch.where(node < 0, NEVER, math.log(NODE_PAGES))[:, None]

    edges = torch.cat(edge_pages(blocks.page, plan), -1).expand(heads, -1, -1)
    edge = _some_pages(query, summaries, edges, blocks, plan)
    mass = edge.mass().logaddexp(log_mass(logit))

    score = best_of_rows(logit - mass, blocks)  # [Hkv, N, J]
    if chosen is not None:
        check_beam(plan, chosen)
        wanted = chosen // NODE_PAGES
        inside = (wanted >= first) & (wanted < end[:, None])
        wanted = lookup(local.table, wanted.where(inside, -1))
        score = score.masked_fill(mark(wanted, inside, near.pages), -NEVER)
    best, columns = score.topk(min(plan.beam, near.pages))
    real = best > NEVER
    child = node_pages(node.expand(heads, -1, -1).gather(2, columns).where(real, -1))
    beam = _some_pages(query, summaries, child, blocks, plan)
    logit.masked_fill_(mark(columns, real, near.pages).unsqueeze(2), NEVER)
    return Context(
        torch.cat([edges, beam.page], -1),
        PageLogits.joined([edge.logits, beam.logits], partial(torch.cat, dim=-1)),
        torch.cat([edge.value, beam.value], 2),
        Nodes(logit, near.value[:, None]),
    )


def log_mass(logit: Tensor) -> Tensor:
    """[..., S] -> [..., 1]: the log of the sum of exp, by log_softmax, twice as fast on a CPU."""
    top = logit.amax(-1, keepdim=True)
    mass = top - logit.log_softmax(-1).amax(-1, keepdim=True)
    return mass.where(top > NEVER, NEVER)


def node_range(page: Tensor, plan: SparsePlan) -> tuple[int, Tensor]:
    """The first node past the sink, and the end [N] of those before the window of ``page`` [N]."""
    first = -(-plan.sink_pages // NODE_PAGES)
    return first, ((page - plan.window_pages) // NODE_PAGES).clamp(min=first)


def edge_pages(page: Tensor, plan: SparsePlan) -> tuple[Tensor, Tensor]:
    """The pages before and after the nodes of blocks in ``page`` [N]: [N, S] each, -1 is none."""
    first, end = node_range(page, plan)
    head = torch.arange(first * NODE_PAGES, device=page.device).expand(len(page), -1)
    past = torch.arange(plan.window_pages + NODE_PAGES, device=page.device)
    tail = end[:, None] * NODE_PAGES + past
    return head.where(head < page[:, None], -1), tail.where(tail < page[:, None], -1)


def node_pages(nodes: Tensor) -> Tensor:
    """The pages [..., K * NODE_PAGES] of logical nodes [..., K]; -1 is none."""
    pages = nodes.unsqueeze(-1) * NODE_PAGES + torch.arange(NODE_PAGES, device=nodes.device)
    return pages.where(nodes.unsqueeze(-1) >= 0, -1).flatten(-2)


def check_beam(plan: SparsePlan, chosen: Tensor) -> None:
    """Assert that the nodes of pages ``chosen`` [..., K] have room in the beam."""
    count = chosen.shape[-1]
    assert plan.beam >= count, f"plan.beam of {plan.beam} nodes may not hold {count} chosen pages"


def _some_pages(
    query: Tensor, summaries: Summaries, pages: Tensor, blocks: QueryBlocks, plan: SparsePlan
) -> Context:
    """Columns for logical pages [Hkv, N, S], each block and head its own; -1 is none."""
    shape = (*query.shape[:3], pages.shape[2])
    physical = lookup(blocks.table, pages)
    found = [
        weigh(q, near, blocks, plan)
        for q, near in zip(query, summaries.each_head(physical), strict=True)
    ]
    logits = PageLogits.joined(found, partial(torch.stack, dim=-4))
    value = torch.stack(
        [of.index_select(0, at.flatten()) for of, at in zip(summaries.value, physical, strict=True)]
    )
    return Context(pages, logits.view(*shape), value.float().view(*pages.shape, -1))


def numbers(local: LocalPages, end: Tensor, size: int) -> Tensor:
    """[N, size]: what each local page is to each block, -1 where it is not before ``end`` [N]."""
    table = local.table.expand(len(end), -1)
    number = torch.arange(table.shape[1], device=table.device)
    before = number < end[:, None]
    found = torch.full((len(end), size + 1), -1, device=table.device)
    # what is not before lands in a column that is thrown away
    return found.scatter_(1, table.where(before, size), number.expand_as(table))[:, :size]


def weigh(query: Tensor, summaries: Summaries, blocks: QueryBlocks, plan: SparsePlan) -> PageLogits:
    """``page_logits`` of rows [B, M, D] of the blocks; those of prompts look at no sub-pages."""
    if blocks.tokens.shape[1] == 1:
        return page_logits(query, summaries, plan)
    heads, rows, _ = query.shape
    page = query.new_empty(heads, rows, summaries.sigma.shape[1])
    size = max(1, TILE_LOGITS // rows)
    for start in range(0, page.shape[2], size):
        some = slice(start, start + size)
        tile = Summaries(summaries.mean[:, :, some], summaries.sigma[:, some], summaries.value)
        page[..., some] = page_logits(query, tile, plan).page
    return PageLogits(page, page.new_empty(0, *page.shape), None)


def page_logits(query: Tensor, summaries: Summaries, plan: SparsePlan) -> PageLogits:
    """Weigh the pages of ``summaries`` [B, ...] for query [B, M, D], scaled: [B, M, S].

    The log-sum-exp over a page's means, each of n tokens, of ``q.mean + log n``, plus the guarded
    second cumulant of the keys about those means. The same number chooses pages and weighs the
    pruned ones. Where the model caps its logits, the means' are capped as any key's, and
    deviations shrink by the slope of the cap at the heaviest mean.
    """
    means = summaries.mean.unbind(1)
    parts = query.new_empty(len(means), *query.shape[:2], means[0].shape[1])
    for mean, part in zip(means, parts, strict=True):
        products(query, mean, part)
    slope = None
    if plan.logit_cap > 0:
        soft_cap(parts, plan.logit_cap)
        slope = 1 - parts.amax(0).div_(plan.logit_cap).square_()
    # the log-sum-exp over the means: log_softmax is the fast way to it on a CPU
    weight = (parts[0] - parts.log_softmax(0)[0]).add_(math.log(PAGE_SIZE / len(parts)))
    if plan.remainder in ("mean", "none"):
        return PageLogits(weight, parts, None)
    guarded = spread(query, summaries.sigma, plan.remainder, slope)
    return PageLogits(weight.add_(guarded), parts, guarded)


def spread(query: Tensor, sigma: Tensor, kind: Remainder, slope: Tensor | None = None) -> Tensor:
    """What the spread of a page's keys adds to its logit: query [B, M, D], sigma [B, S, D].

    ``quadratic`` is the second cumulant ``Q = 1/2 q^2 . sigma^2``, which over-estimates where a
    rotary pair is fast and carries a large constant. ``log_cosh`` is the exact log-mean-exp of a
    two-point variable of that deviation, a channel at a time; ``log_i0`` that of a point on a
    circle, a rotary pair (the halves of a head) at a time. ``harmonic``, ``Q L / (Q + L)`` with
    ``L = |q| . sigma``, agrees with them to second order, grows linearly, and is two matrix
    products (docs/algorithm.md, "the guard"). ``slope`` [B, M, S] scales all deviations.
    """
    if kind in ("log_cosh", "log_i0"):
        if kind == "log_i0":
            query, sigma = pair_norms(query), pair_norms(sigma)
        x = query.abs().unsqueeze(2) * sigma.unsqueeze(1)  # [B, M, S, D]
        if slope is not None:
            x *= slope.unsqueeze(-1)
        if kind == "log_i0":
            return x.add_(torch.special.i0e(x).log_()).sum(-1)
        return (x + torch.log1p(torch.exp(-2 * x)) - math.log(2)).sum(-1)
    # head by head through one buffer, so that the squares stay in the cache
    square = torch.empty_like(sigma[:1])
    quadratic = query.new_empty(*query.shape[:2], sigma.shape[1])
    for q, s, head in zip(query, sigma, quadratic, strict=True):
        products(0.5 * q.square()[None], torch.square(s[None], out=square), head[None])
    if slope is not None:
        quadratic *= slope.square()
    if kind == "quadratic":
        return quadratic
    linear = products(query.abs(), sigma)
    if slope is not None:
        linear *= slope
    # where both are 0 so is their product: the tiny constant only keeps 0 / 0 away
    total = (quadratic + linear).add_(torch.finfo(linear.dtype).tiny)
    return quadratic.mul_(linear).div_(total)


def pair_norms(x: Tensor) -> Tensor:
    """[..., D] -> [..., ceil(D / 2)]: the length of each pair of a channel and its other half."""
    left, right = x[..., : -(-x.shape[-1] // 2)], x[..., -(-x.shape[-1] // 2) :]
    # an odd channel has no other half
    norms: Tensor = torch.hypot(left, pad(right, (0, left.shape[-1] - right.shape[-1])))
    return norms


def mark(index: Tensor, valid: Tensor, size: int) -> Tensor:
    """A bool mask [..., size] that is true at the valid ones of index [..., K]."""
    mask = torch.zeros(*index.shape[:-1], size + 1, dtype=torch.bool, device=index.device)
    # what is not valid lands in a column that is thrown away
    return mask.scatter_(-1, index.where(valid, size), True)[..., :size]


def lookup(table: Tensor, pages: Tensor) -> Tensor:
    """Logical pages [Hkv, N, K] through table [N | 1, P]; padding (-1) reads as page 0."""
    return table.expand(*pages.shape[:2], -1).gather(2, pages.clamp(min=0))


def best_of_rows(share: Tensor, blocks: QueryBlocks) -> Tensor:
    """share [Hkv, N, M, S] (overwritten) -> [Hkv, N, S], the best of the real rows."""
    padding = blocks.position < 0  # [N, R]
    if bool(padding.any()):
        padding = padding.repeat_interleave(share.shape[2] // padding.shape[1], 1)
        share.masked_fill_(padding.unsqueeze(-1), NEVER)
    return share.amax(2)
