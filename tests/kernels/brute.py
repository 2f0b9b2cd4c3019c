"""Attention, summaries and selection by plain loops, written from docs/algorithm.md alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from hip_kernels.layout import PAGE_SIZE, PagedKV, SparsePlan, Summaries
from hip_kernels.ops import attend, plan_blocks, summarize
from torch import Tensor


@dataclass
class Request:
    """One request's own view: contiguous keys and values of its tokens."""

    key: Tensor  # [T, Hkv, D]
    value: Tensor  # [T, Hkv, Dv]
    prefix: int  # tokens that were there before this forward pass

    @property
    def length(self) -> int:
        return self.key.shape[0]


@dataclass
class Pool:
    """Requests scattered over a paged pool in a random order of pages."""

    kv: PagedKV
    summaries: Summaries
    page_table: Tensor  # [B, P]


def scatter(requests: list[Request], *, means: int = 4, spare: int = 3, seed: int = 0) -> Pool:
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-request.length // PAGE_SIZE) for request in requests]
    order = torch.randperm(sum(counts) + spare, generator=generator)
    heads, width = requests[0].key.shape[1:]
    value_width = requests[0].value.shape[2]
    slots = len(order) * PAGE_SIZE
    # what nobody has written must never be read into a result
    kv = PagedKV(
        torch.full((slots, heads, width), 1e4), torch.full((slots, heads, value_width), 1e4)
    )
    # entries past a request's end are stale pages of others
    table = torch.randint(0, len(order), (len(requests), max(counts)), generator=generator)
    used = 0
    complete = []
    for row, (request, count) in enumerate(zip(requests, counts, strict=True)):
        pages = order[used : used + count]
        used += count
        table[row, :count] = pages
        position = torch.arange(request.length)
        slot = pages[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
        kv.key[slot], kv.value[slot] = request.key, request.value
        complete.append(pages[: request.length // PAGE_SIZE])
    summaries = Summaries.empty(len(order), heads, width, value_width, means=means)
    for tensor in summaries.tensors:
        tensor.fill_(1e4)
    summarize(kv, torch.cat(complete), summaries)
    return Pool(kv, summaries, table)


def make_requests(
    shapes: list[tuple[int, int]], *, heads: int, width: int, value_width: int, seed: int = 0
) -> list[Request]:
    """shapes: (tokens before, tokens new). Keys drift, so that pages differ."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for prefix, new in shapes:
        total = prefix + new
        drift = torch.randn(total, heads, width, generator=generator).cumsum(0) * 0.1
        key = drift + 0.5 * torch.randn(total, heads, width, generator=generator)
        value = torch.randn(total, heads, value_width, generator=generator)
        found.append(Request(key, value, prefix))
    return found


def run(
    requests: list[Request],
    query: Tensor,
    plan: SparsePlan,
    *,
    sparse_from: int | None,
    sparse_decode_from: int | None,
    means: int = 4,
    seed: int = 0,
) -> Tensor:
    """The door of the kernels: everything a backend does in one layer, on a scattered pool."""
    pool = scatter(requests, means=means, seed=seed)
    out = torch.full((query.shape[0], query.shape[1], requests[0].value.shape[2]), math.nan)
    blocks = plan_blocks(
        [request.prefix for request in requests],
        [request.length for request in requests],
        pool.page_table,
        sparse_from=sparse_from,
        sparse_decode_from=sparse_decode_from,
    )
    for block in blocks:
        attend(query, pool.kv, pool.summaries, block, plan, query.shape[2] ** -0.5, out)
    return out


def expected(
    requests: list[Request],
    query: Tensor,
    plan: SparsePlan,
    *,
    sparse_from: int | None,
    sparse_decode_from: int | None,
    means: int = 4,
) -> Tensor:
    """The same by loops in float64."""
    outputs = []
    row = 0
    for request in requests:
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
                exact, read = set(range(page + 1)), []
                if prune:
                    exact, read = one.exact_pages(block, page, plan, single)
                for t in range(low, high):
                    for g in range(group):
                        result[t - request.prefix, head * group + g] = one.attend(
                            block[t - low, g], t, exact, read, plan
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


@dataclass(eq=False)
class Head:
    """One KV head of one request."""

    key: Tensor  # [T, D]
    value: Tensor  # [T, Dv]
    means: int  # sub-pages a page

    def exact_pages(
        self, block: Tensor, page: int, plan: SparsePlan, single: bool
    ) -> tuple[set[int], list[tuple[int, int]]]:
        """block [R, G, D]: sink, window, own page, and the best of the rest; sub-pages read."""
        sink = set(range(min(plan.sink_pages, page)))
        window = set(range(max(0, page - plan.window_pages), page + 1))
        rest = [p for p in range(page) if p not in sink | window]
        rows = block.flatten(0, 1)
        if plan.strategy == "tree":
            return sink | window | self.searched(rows, page, plan), []
        logits = [[self.pruned_logit(q, p, plan) for p in range(page)] for q in rows]
        mass = torch.tensor(logits, dtype=torch.float64).view(len(rows), page).logsumexp(1)

        def share(score: Callable[[Tensor], float]) -> float:
            return max(score(q) - float(m) for q, m in zip(rows, mass, strict=True))

        def estimated(p: int) -> float:
            return share(lambda q: self.pruned_logit(q, p, plan))

        if not (single and plan.second_look):
            return sink | window | set(sorted(rest, key=estimated)[-plan.budget_pages :]), []

        def promise(place: tuple[int, int]) -> float:
            return share(lambda q: self.sub_page_logit(q, place, plan))

        places = sorted(((p, part) for p in rest for part in range(self.means)), key=promise)
        read = places[-plan.second_look * plan.budget_pages * self.means :]

        def true(p: int) -> float:
            keys = torch.cat([self.sub_page(place) for place in read if place[0] == p])
            return share(lambda q: float((keys @ q).logsumexp(0)))

        chosen = sorted({p for p, _ in read}, key=true)[-plan.budget_pages :]
        return sink | window | set(chosen), read

    def sub_page(self, place: tuple[int, int]) -> Tensor:
        page, part = place
        return self.key[page * PAGE_SIZE : (page + 1) * PAGE_SIZE].chunk(self.means)[part]

    def sub_page_logit(self, q: Tensor, place: tuple[int, int], plan: SparsePlan) -> float:
        means, sigma = self.summary(place[0])
        size = math.log(PAGE_SIZE / self.means)
        return float(q @ means[place[1]]) + self.spread(q, sigma, plan) + size

    def correction(self, q: Tensor, read: list[tuple[int, int]], plan: SparsePlan) -> float:
        """How much too high the estimates of the sub-pages were that were read, at least 0."""
        wrong = [
            float((self.sub_page(place) @ q).logsumexp(0)) - self.sub_page_logit(q, place, plan)
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
    def summary(self, page: int) -> tuple[Tensor, Tensor]:
        parts = self.key[page * PAGE_SIZE : (page + 1) * PAGE_SIZE].chunk(self.means)
        means = torch.stack([part.mean(0) for part in parts])
        spread = torch.cat([(part - part.mean(0)) ** 2 for part in parts])
        return means, spread.mean(0).sqrt()

    def pruned_logit(self, q: Tensor, page: int, plan: SparsePlan) -> float:
        """A pruned page as one key."""
        means, sigma = self.summary(page)
        mean = float((means @ q).logsumexp(0)) + math.log(PAGE_SIZE / self.means)
        return mean + self.spread(q, sigma, plan)

    def spread(self, q: Tensor, sigma: Tensor, plan: SparsePlan) -> float:
        quadratic = 0.5 * float((q**2 * sigma**2).sum())
        linear = float((q.abs() * sigma).sum())
        if plan.remainder == "quadratic":
            return quadratic
        if plan.remainder == "log_cosh":
            return float(torch.log(torch.cosh(q * sigma)).sum())
        if plan.remainder == "harmonic":
            return quadratic * linear / (quadratic + linear) if quadratic + linear else 0.0
        return 0.0

    def attend(
        self, q: Tensor, t: int, exact: set[int], read: list[tuple[int, int]], plan: SparsePlan
    ) -> Tensor:
        logits, values = [], []
        correction = self.correction(q, read, plan)
        for page in range(t // PAGE_SIZE + 1):
            span = slice(page * PAGE_SIZE, min((page + 1) * PAGE_SIZE, t + 1))
            if page in exact:
                logits += [float(q @ k) for k in self.key[span]]
                values += list(self.value[span])
            elif plan.remainder != "none":
                logits.append(self.pruned_logit(q, page, plan) + correction)
                values.append(self.value[span].mean(0))
        weight = torch.tensor(logits, dtype=torch.float64).softmax(0)
        return weight @ torch.stack(values)
