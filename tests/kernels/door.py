"""The kernels' door as tests use it: requests scattered over a paged pool, and one layer's step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from hip_kernels.layout import NODE_PAGES, PAGE_SIZE, Choice, SparsePlan, Summaries
from hip_kernels.ops import attend, plan_blocks, pool, summarize
from hip_kernels.stored import PagedKV
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


def scatter(
    requests: list[Request],
    *,
    means: int = 4,
    spare: int = 3,
    seed: int = 0,
    scales: tuple[float, float] = (1.0, 1.0),
) -> Pool:
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-request.length // PAGE_SIZE) for request in requests]
    order = torch.randperm(sum(counts) + spare, generator=generator)
    heads, width = requests[0].key.shape[1:]
    value_width = requests[0].value.shape[2]
    slots = len(order) * PAGE_SIZE
    # what nobody has written must never be read into a result
    dtype = requests[0].key.dtype
    rubbish = [torch.full((slots, heads, w), 400.0).to(dtype) for w in (width, value_width)]
    kv = PagedKV(*rubbish, *scales)
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


def with_nodes(here: Pool, requests: list[Request], seed: int) -> tuple[Summaries, Tensor]:
    """The nodes of all requests in a random order, and the table that leads to them."""
    counts = [request.length // PAGE_SIZE // NODE_PAGES for request in requests]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed))
    heads, _, _, width = here.summaries.mean.shape
    nodes = Summaries.empty(len(order), heads, width, here.summaries.value.shape[2], means=1)
    table = torch.full((len(requests), max(counts)), 0)
    for row, (count, mine) in enumerate(zip(counts, order.split(counts), strict=True)):
        table[row, :count] = mine
        pages = here.page_table[row, : count * NODE_PAGES].view(-1, NODE_PAGES)
        pool(here.summaries, pages, mine, nodes)
    return nodes, table


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


def run(requests: list[Request], query: Tensor, plan: SparsePlan, **how: Any) -> Tensor:
    """The door of the kernels: everything a backend does in one layer, on a scattered pool."""
    return step(requests, query, plan, **how)[0]


def step(
    requests: list[Request],
    query: Tensor,
    plan: SparsePlan,
    *,
    sparse_from: int | None,
    sparse_decode_from: int | None,
    nodes_from: int | None = None,
    means: int = 4,
    seed: int = 0,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    held: Choice | None = None,
) -> tuple[Tensor, Choice]:
    """Also what each request's last block chose: pages [B, Hkv, budget], correction [B, Hkv, G]."""
    scales = (key_scale, value_scale)
    here = scatter(requests, means=means, seed=seed, scales=scales)
    nodes, node_table = None, None
    if nodes_from is not None:
        nodes, node_table = with_nodes(here, requests, seed)
    out = torch.full((query.shape[0], query.shape[1], requests[0].value.shape[2]), math.nan)
    blocks = plan_blocks(
        [request.prefix for request in requests],
        [request.length for request in requests],
        here.page_table,
        sparse_from=sparse_from,
        sparse_decode_from=sparse_decode_from,
        nodes_from=nodes_from,
        node_table=node_table,
        reuses=None if held is None else torch.ones(len(requests), dtype=torch.bool),
    )
    scale = query.shape[2] ** -0.5
    heads = requests[0].key.shape[1]
    made = Choice(
        torch.full((len(requests), heads, plan.entries), -1),
        torch.zeros(len(requests), heads, query.shape[1] // heads),
    )
    for block in blocks:
        again = None
        if block.reuses:
            assert held is not None
            again = Choice(held.entries[block.request], held.correction[block.request])
        found = attend(query, here.kv, here.summaries, block, plan, scale, out, nodes, again)
        if found is not None and block.tokens.shape[1] == 1:
            width = found.choice.entries.shape[2]
            made.entries[block.request, :, :width] = found.choice.entries
            made.correction[block.request] = found.choice.correction
    return out, made
