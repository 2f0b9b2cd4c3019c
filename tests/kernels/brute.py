"""Attention, summaries and selection by plain loops, written from docs/algorithm.md alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

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


def scatter(requests: list[Request], *, spare: int = 3, seed: int = 0) -> Pool:
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
    summaries = Summaries.empty(len(order), heads, width, value_width)
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
    seed: int = 0,
) -> Tensor:
    """The door of the kernels: everything a backend does in one layer, on a scattered pool."""
    pool = scatter(requests, seed=seed)
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
) -> Tensor:
    """The same by loops in float64."""
    scale = query.shape[2] ** -0.5
    outputs = []
    row = 0
    for request in requests:
        new = request.length - request.prefix
        threshold = sparse_decode_from if new == 1 else sparse_from
        group = query.shape[1] // request.key.shape[1]
        mine = query[row : row + new].double() * scale
        row += new
        result = torch.zeros(new, query.shape[1], request.value.shape[2], dtype=torch.float64)
        for page in range(request.prefix // PAGE_SIZE, (request.length - 1) // PAGE_SIZE + 1):
            low = max(page * PAGE_SIZE, request.prefix)
            high = min((page + 1) * PAGE_SIZE, request.length)
            prune = threshold is not None and page * PAGE_SIZE >= threshold
            for head in range(request.key.shape[1]):
                heads = range(head * group, (head + 1) * group)
                block = mine[low - request.prefix : high - request.prefix, heads]  # [R, G, D]
                key, value = request.key[:, head].double(), request.value[:, head].double()
                exact = set(range(page + 1))
                if prune:
                    exact = exact_pages(block, key, page, plan)
                for t in range(low, high):
                    for g, h in enumerate(heads):
                        q = block[t - low, g]
                        result[t - request.prefix, h] = one_row(q, key, value, t, page, exact, plan)
        outputs.append(result)
    return torch.cat(outputs)


def exact_pages(block: Tensor, key: Tensor, page: int, plan: SparsePlan) -> set[int]:
    """block [R, G, D]: sink, window, own page, and the best of the rest."""
    sink = set(range(min(plan.sink_pages, page)))
    window = set(range(max(0, page - plan.window_pages), page + 1))
    logits = torch.tensor(
        [[choice_logit(q, key, p, plan) for p in range(page)] for q in block.flatten(0, 1)],
        dtype=torch.float64,
    ).view(-1, page)
    best = logits.sub(logits.logsumexp(1, keepdim=True)).amax(0) if page else torch.zeros(0)
    rest = [p for p in range(page) if p not in sink | window]
    rest.sort(key=lambda p: -float(best[p]))
    return sink | window | set(rest[: plan.budget_pages])


def choice_logit(q: Tensor, key: Tensor, page: int, plan: SparsePlan) -> float:
    keys = key[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
    if not plan.sub_page_means:
        return pruned_logit(q, keys, plan)
    masses = [16 * math.exp(float(q @ keys[i : i + 16].mean(0))) for i in range(0, 64, 16)]
    return math.log(sum(masses))


def pruned_logit(q: Tensor, keys: Tensor, plan: SparsePlan) -> float:
    """A pruned page of n keys as one key."""
    mean = float(q @ keys.mean(0)) + math.log(len(keys))
    sigma = keys.std(0, correction=0)
    quadratic = 0.5 * float((q**2 * sigma**2).sum())
    linear = float((q.abs() * sigma).sum())
    if plan.remainder == "quadratic":
        return mean + quadratic
    if plan.remainder == "log_cosh":
        return mean + float(torch.log(torch.cosh(q * sigma)).sum())
    if plan.remainder == "harmonic":
        together = quadratic + linear
        return mean + (quadratic * linear / together if together else 0.0)
    return mean


def one_row(
    q: Tensor, key: Tensor, value: Tensor, t: int, page: int, exact: set[int], plan: SparsePlan
) -> Tensor:
    logits, values = [], []
    for p in range(page + 1):
        span = slice(p * PAGE_SIZE, min((p + 1) * PAGE_SIZE, t + 1))
        if p in exact:
            logits += [float(q @ k) for k in key[span]]
            values += list(value[span])
        elif plan.remainder != "none":
            logits.append(pruned_logit(q, key[span], plan))
            values.append(value[span].mean(0))
    weight = torch.tensor(logits, dtype=torch.float64).softmax(0)
    return weight @ torch.stack(values)
