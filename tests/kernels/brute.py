"""Attention, summaries and selection by plain loops, written from docs/algorithm.md alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from hip_kernels.layout import NODE_PAGES, PAGE_SIZE, Choice, SparsePlan
from torch import Tensor

from tests.kernels.door import Request


def expected(
    requests: list[Request],
    query: Tensor,
    plan: SparsePlan,
    *,
    sparse_from: int | None,
    sparse_decode_from: int | None,
    nodes_from: int | None = None,
    means: int = 4,
    held: Choice | None = None,
) -> Tensor:
    """The same by loops in float64."""
    outputs = []
    row = 0
    for number, request in enumerate(requests):
        new = request.length - request.prefix
        threshold = sparse_decode_from if new == 1 else sparse_from
        heads = request.key.shape[1]
        group = query.shape[1] // heads
        mine = query[row : row + new].double() * query.shape[2] ** -0.5
        row += new
        result = torch.zeros(new, query.shape[1], request.value.shape[2], dtype=torch.float64)
        for low, high in query_blocks(request):
            page = low // PAGE_SIZE
            prune = threshold is not None and page * PAGE_SIZE >= threshold
            for head in range(heads):
                one = Head(request.key[:, head].double(), request.value[:, head].double(), means)
                group_heads = slice(head * group, (head + 1) * group)
                block = mine[low - request.prefix : high - request.prefix, group_heads]
                single = high - low == 1
                far = nodes_from is not None and page * PAGE_SIZE >= nodes_from
                seen = Seen(set(range(page + 1)))
                if prune:
                    known = None
                    if held is not None:
                        known = {p for p in held.entries[number, head].tolist() if p >= 0}
                    seen = one.look(block.flatten(0, 1), page, plan, single, far, known)
                    if held is not None:
                        seen.corrections = held.correction[number, head].tolist()
                for t in range(low, high):
                    for g in range(group):
                        result[t - request.prefix, head * group + g] = one.attend(
                            block[t - low, g], g, t, seen, plan
                        )
        outputs.append(result)
    return torch.cat(outputs)


def query_blocks(request: Request) -> list[tuple[int, int]]:
    """Rows by pages; the last row of an incomplete page by itself."""
    bounds = {request.prefix, request.length}
    bounds |= set(range(-(-request.prefix // PAGE_SIZE) * PAGE_SIZE, request.length, PAGE_SIZE))
    if request.length % PAGE_SIZE:
        bounds.add(request.length - 1)
    ordered = sorted(bounds)
    return list(itertools.pairwise(ordered))


def capped(logits: Tensor, plan: SparsePlan) -> Tensor:
    return plan.logit_cap * torch.tanh(logits / plan.logit_cap) if plan.logit_cap else logits


def slope(logits: Tensor, plan: SparsePlan) -> float:
    """Of the cap, at the largest of the capped logits."""
    return 1 - float(logits.max() / plan.logit_cap) ** 2 if plan.logit_cap else 1.0


@dataclass
class Seen:
    """What a block attends exactly, estimates, and has read to choose: pages, nodes, sub-pages."""

    exact: set[int]
    parts: set[tuple[int, int]] = field(default_factory=set)  # sub-pages of other pages
    pages: list[int] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    read: list[tuple[int, int]] = field(default_factory=list)
    corrections: list[float] | None = None  # of an earlier step, by query head


@dataclass(eq=False)
class Head:
    """One KV head of one request."""

    key: Tensor  # [T, D]
    value: Tensor  # [T, Dv]
    means: int  # sub-pages a page

    def look(
        self,
        rows: Tensor,
        page: int,
        plan: SparsePlan,
        single: bool,
        far: bool,
        known: set[int] | None,
    ) -> Seen:
        """rows [M, D] of a block in ``page``: what they attend exactly and what they estimate.

        Where the chosen pages are ``known``, they are what an earlier step chose.
        """
        sink = set(range(min(plan.sink_pages, page)))
        window = set(range(max(0, page - plan.window_pages), page + 1))
        if plan.strategy == "tree":
            exact = sink | window | self.searched(rows, page, plan)
            return Seen(exact, pages=[p for p in range(page) if p not in exact])
        pages, nodes = list(range(page)), []
        if far:
            pages, nodes = self.beam(rows, page, plan, {p // NODE_PAGES for p in known or ()})
        if known is not None:
            exact = sink | window | known
            return Seen(exact, pages=[p for p in pages if p not in exact], nodes=nodes)
        mass = self.mass(rows, pages, nodes, plan)

        def share(score: Callable[[Tensor], float]) -> float:
            return max(score(q) - float(m) for q, m in zip(rows, mass, strict=True))

        def estimated(p: int) -> float:
            return share(lambda q: self.pruned_logit(q, p, plan))

        def weight(q: Tensor, entry: Any) -> float:
            if isinstance(entry, tuple):
                return self.sub_page_logit(q, entry, plan)
            return self.pruned_logit(q, entry, plan)

        rest = [p for p in pages if p not in sink | window]
        read: list[tuple[int, int]] = []
        chosen: list[Any] = sorted(rest, key=estimated)[-plan.budget_pages :]
        if single and plan.second_look:

            def promise(place: tuple[int, int]) -> float:
                return share(lambda q: self.sub_page_logit(q, place, plan))

            places = sorted(((p, part) for p in rest for part in range(self.means)), key=promise)
            read = places[-plan.second_look * plan.budget_pages * self.means :]

            def true(*some: tuple[int, int]) -> float:
                keys = torch.cat([self.sub_page(place) for place in some])
                return share(lambda q: float(capped(keys @ q, plan).logsumexp(0)))

            def of_page(p: int) -> float:
                return true(*(place for place in read if place[0] == p))

            chosen = sorted({p for p, _ in read}, key=of_page)[-plan.budget_pages :]
            if plan.parts > 1:
                chosen = sorted(read, key=true)[-plan.budget_pages * plan.parts :]
        if plan.top_p < 1:
            fixed = [p for p in pages if p not in rest]
            chosen = self.enough(rows, chosen, fixed, mass, plan.top_p, weight)
        exact = sink | window | {entry for entry in chosen if not isinstance(entry, tuple)}
        parts = {entry for entry in chosen if isinstance(entry, tuple)}
        return Seen(exact, parts, [p for p in pages if p not in exact], nodes, read)

    def enough(
        self,
        rows: Tensor,
        chosen: list[Any],
        fixed: list[int],
        mass: Tensor,
        top_p: float,
        weight: Callable[[Tensor, Any], float],
    ) -> list[Any]:
        """Of the chosen, worst first, as few as hold the share with the fixed, for every row."""

        def held(q: Tensor, m: Tensor, some: list[Any]) -> float:
            return sum(math.exp(weight(q, entry) - float(m)) for entry in some)

        most = 0
        for q, m in zip(rows, mass, strict=True):
            count = 0
            while count < len(chosen):
                if held(q, m, fixed + chosen[len(chosen) - count :]) >= top_p:
                    break
                count += 1
            most = max(most, count)
        return chosen[len(chosen) - most :]

    def beam(
        self, rows: Tensor, page: int, plan: SparsePlan, wanted: set[int]
    ) -> tuple[list[int], list[int]]:
        """The pages that are weighed by themselves, and the nodes that hold the others."""
        first = -(-plan.sink_pages // NODE_PAGES)
        end = max(first, (page - plan.window_pages) // NODE_PAGES)
        edges = [*range(first * NODE_PAGES), *range(end * NODE_PAGES, page)]
        edges = [p for p in edges if p < page]
        nodes = list(range(first, end))
        mass = self.mass(rows, edges, nodes, plan)

        def share(node: int) -> float:
            logits = [self.pruned_logit(q, node, plan, NODE_PAGES) for q in rows]
            best = max(logit - float(m) for logit, m in zip(logits, mass, strict=True))
            return math.inf if node in wanted else best

        ranked = sorted(nodes, key=share, reverse=True)
        pages = [node * NODE_PAGES + n for node in ranked[: plan.beam] for n in range(NODE_PAGES)]
        return edges + pages, ranked[plan.beam :]

    def mass(self, rows: Tensor, pages: list[int], nodes: list[int], plan: SparsePlan) -> Tensor:
        """[M]: the log-sum-exp over all pages before the block."""
        logits = [
            [self.pruned_logit(q, p, plan) for p in pages]
            + [self.pruned_logit(q, node, plan, NODE_PAGES) for node in nodes]
            for q in rows
        ]
        return torch.tensor(logits, dtype=torch.float64).view(len(rows), -1).logsumexp(1)

    def sub_page(self, place: tuple[int, int], of: Tensor | None = None) -> Tensor:
        """Its keys, or rows of something else."""
        page, part = place
        rows = self.key if of is None else of
        return rows[page * PAGE_SIZE : (page + 1) * PAGE_SIZE].chunk(self.means)[part]

    def rest(
        self, q: Tensor, page: int, correction: float, seen: Seen, plan: SparsePlan
    ) -> list[float]:
        """What the sub-pages of a pruned page weigh that are not attended exactly."""
        found = []
        for place in ((page, part) for part in range(self.means)):
            if place in seen.parts:
                continue
            estimate = self.sub_page_logit(q, place, plan)
            true = float(capped(self.sub_page(place) @ q, plan).logsumexp(0))
            found.append(min(true, estimate) if place in seen.read else estimate + correction)
        return found

    def sub_page_logit(self, q: Tensor, place: tuple[int, int], plan: SparsePlan) -> float:
        means, sigma = self.summary(place[0])
        logits = capped(means @ q, plan)
        size = math.log(PAGE_SIZE / self.means)
        return float(logits[place[1]]) + self.spread(q, sigma * slope(logits, plan), plan) + size

    def correction(self, q: Tensor, read: list[tuple[int, int]], plan: SparsePlan) -> float:
        """How much too high the estimates of the sub-pages were that were read, at least 0."""
        wrong = [
            float(capped(self.sub_page(place) @ q, plan).logsumexp(0))
            - self.sub_page_logit(q, place, plan)
            for place in read
        ]
        return min(0.0, sum(wrong) / len(wrong)) if wrong else 0.0

    def searched(self, rows: Tensor, page: int, plan: SparsePlan) -> set[int]:
        """HiP's search: halve every chunk, keep the halves whose centre tokens score best."""
        beam, low = plan.budget_pages, plan.sink_pages
        between = max(0, page - plan.window_pages - low)
        edges = [low + i * between // beam for i in range(beam + 1)]
        chunks = list(itertools.pairwise(edges))

        def score(half: tuple[int, int]) -> float:
            first, last = half[0] * PAGE_SIZE, half[1] * PAGE_SIZE
            return float((rows @ self.key[(first + last) // 2]).max())

        while any(end - start > 1 for start, end in chunks):
            halves = []
            for start, end in chunks:
                middle = (start + end) // 2
                halves += [half for half in ((start, middle), (middle, end)) if half[0] < half[1]]
            chunks = sorted(halves, key=score)[-beam:]
        return {start for start, end in chunks if start < end}

    @cache  # noqa: B019 - a head lives as long as its test
    def summary(self, number: int, pages: int = 1) -> tuple[Tensor, Tensor]:
        """Means and deviation of a page; of a node of several it is one mean."""
        span = pages * PAGE_SIZE
        parts = self.key[number * span : (number + 1) * span].chunk(self.means if pages == 1 else 1)
        means = torch.stack([part.mean(0) for part in parts])
        spread = torch.cat([(part - part.mean(0)) ** 2 for part in parts])
        return means, spread.mean(0).sqrt()

    def pruned_logit(self, q: Tensor, number: int, plan: SparsePlan, pages: int = 1) -> float:
        """A pruned page or node as one key."""
        means, sigma = self.summary(number, pages)
        logits = capped(means @ q, plan)
        mean = float(logits.logsumexp(0)) + math.log(pages * PAGE_SIZE / len(means))
        return mean + self.spread(q, sigma * slope(logits, plan), plan)

    def spread(self, q: Tensor, sigma: Tensor, plan: SparsePlan) -> float:
        quadratic = 0.5 * float((q**2 * sigma**2).sum())
        linear = float((q.abs() * sigma).sum())
        if plan.remainder == "quadratic":
            return quadratic
        if plan.remainder == "log_cosh":
            return float(torch.log(torch.cosh(q * sigma)).sum())
        if plan.remainder == "log_i0":
            half = -(-len(q) // 2)
            total = 0.0
            for d in range(half):
                pair = [c for c in (d, d + half) if c < len(q)]
                x = q[pair].norm() * sigma[pair].norm()
                total += float(torch.log(torch.special.i0(x)))
            return total
        if plan.remainder == "harmonic":
            return quadratic * linear / (quadratic + linear) if quadratic + linear else 0.0
        return 0.0

    def attend(self, q: Tensor, g: int, t: int, seen: Seen, plan: SparsePlan) -> Tensor:
        logits, values = [], []
        for page in seen.exact:
            span = slice(page * PAGE_SIZE, min((page + 1) * PAGE_SIZE, t + 1))
            logits += capped(self.key[span] @ q, plan).tolist()
            values += list(self.value[span])
        for place in seen.parts:
            logits += capped(self.sub_page(place) @ q, plan).tolist()
            values += list(self.sub_page(place, self.value))
        if plan.remainder != "none":
            correction = self.correction(q, seen.read, plan)
            if seen.corrections is not None:
                correction = seen.corrections[g]
            for page in seen.pages:
                rest = self.rest(q, page, correction, seen, plan)
                if rest:
                    logits.append(float(torch.tensor(rest, dtype=torch.float64).logsumexp(0)))
                    values.append(self.value[page * PAGE_SIZE : (page + 1) * PAGE_SIZE].mean(0))
            for node in seen.nodes:
                span = slice(node * NODE_PAGES * PAGE_SIZE, (node + 1) * NODE_PAGES * PAGE_SIZE)
                logits.append(self.pruned_logit(q, node, plan, NODE_PAGES) + correction)
                values.append(self.value[span].mean(0))
        weight = torch.tensor(logits, dtype=torch.float64).softmax(0)
        return weight @ torch.stack(values)
