"""Summaries on a GPU, straight from the paged pool: one program a page (or node) and KV head.

The same operations as ``reference.py``, where the mathematics is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hip_kernels.checks import check, check_summaries
from hip_kernels.layout import NODE_PAGES, PAGE_SIZE, Summaries
from hip_kernels.offloaded import OffloadedKV
from hip_kernels.rows import Rows
from hip_kernels.stored import StoredKV


def summarize(kv: StoredKV, pages: Tensor, out: Summaries) -> None:
    """Summarise complete pages [C], physical, into ``out``; -1 is none (``ops.summarize``)."""
    heads, width, value_width = kv.kv_heads, out.mean.shape[-1], out.value.shape[-1]
    if isinstance(kv, OffloadedKV):
        # the device may hold none of the pages that a prompt completes
        key = value = kv.host.rows.view(kv.dtype)
        span = PAGE_SIZE * (width + value_width)
        check("kv.host.rows", key, (None, heads, span))
    else:
        stored = Rows.of(kv, width)
        key, value, span = stored.key, stored.value, 0
        check("kv.value", value, (None, heads, value_width))
    check("pages", pages, (None,), torch.int64)
    check_summaries("out", out, kv.kv_heads)
    if pages.numel() == 0:
        return
    scales = float(kv.key_scale), float(kv.value_scale)
    limit = torch.finfo(out.mean.dtype).max
    _summarize[(len(pages), kv.kv_heads)](
        *(key, value, pages, *out.tensors, *scales, limit, out.pages),
        PAGE=PAGE_SIZE,
        SPAN=span,
        **_sizes(out),
    )


def pool(summaries: Summaries, pages: Tensor, nodes: Tensor, out: Summaries) -> None:
    """Summarise nodes [C] from the summaries of their pages [C, n] into ``out``."""
    check("nodes", nodes, (None,), torch.int64)
    check("pages", pages, (len(nodes), NODE_PAGES), torch.int64)
    check_summaries("summaries", summaries, len(out.sigma))
    check_summaries("out", out, len(out.sigma))
    check("out.mean", out.mean, (None, 1, None, None), out.mean.dtype)
    if nodes.numel() == 0:
        return
    limit = torch.finfo(out.mean.dtype).max
    _pool[(len(nodes), len(out.sigma))](
        *(*summaries.tensors, pages, nodes, *out.tensors, limit, summaries.pages, out.pages),
        PAGES=NODE_PAGES,
        **_sizes(summaries),
    )


def _sizes(of: Summaries) -> dict[str, int]:
    width, value_width = of.mean.shape[-1], of.value.shape[-1]
    return {
        "MEANS": of.mean.shape[1],
        "WIDTH": width,
        "VALUE_WIDTH": value_width,
        "BLOCK": triton.next_power_of_2(width),
        "VALUE_BLOCK": triton.next_power_of_2(value_width),
        "num_warps": 4 if max(width, value_width) <= 128 else 8,
    }


@triton.jit
def _summarize(
    key,
    value,
    pages,
    mean,
    sigma,
    mean_value,
    key_scale,
    value_scale,
    limit,
    count,  # pages that the summaries have room for
    PAGE: tl.constexpr,
    SPAN: tl.constexpr,  # numbers of a page of a KV head in host memory; 0: a pool of rows
    MEANS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):
    page = tl.load(pages + tl.program_id(0))
    if page < 0:
        return
    head = tl.program_id(1).to(tl.int64)
    row = (page * PAGE + tl.arange(0, PAGE)) * tl.num_programs(1) + head  # of the pool
    if SPAN > 0:
        key += (page * tl.num_programs(1) + head) * SPAN
        value += (page * tl.num_programs(1) + head) * SPAN + PAGE * WIDTH
        row = tl.arange(0, PAGE)
    d = tl.arange(0, BLOCK)
    keys = tl.load(key + row[:, None] * WIDTH + d[None, :], mask=d[None, :] < WIDTH, other=0.0)
    keys = keys.to(tl.float32) * key_scale
    parts = tl.reshape(keys, (MEANS, PAGE // MEANS, BLOCK))
    centre = tl.sum(parts, 1) / (PAGE // MEANS)
    apart = parts - centre[:, None, :]
    deviation = tl.sqrt(tl.sum(tl.sum(apart * apart, 1), 0) / PAGE)
    _store(mean, sigma, centre, deviation, head, page, count, limit, MEANS, WIDTH, BLOCK)

    d = tl.arange(0, VALUE_BLOCK)
    here = row[:, None] * VALUE_WIDTH + d[None, :]
    values = tl.load(value + here, mask=d[None, :] < VALUE_WIDTH, other=0.0).to(tl.float32)
    average = _saturate(tl.sum(values * value_scale, 0) / PAGE, limit)
    there = (head * count + page) * VALUE_WIDTH + d
    tl.store(mean_value + there, average, mask=d < VALUE_WIDTH)


@triton.jit
def _pool(
    mean,
    sigma,
    value,
    pages,
    nodes,
    node_mean,
    node_sigma,
    node_value,
    limit,
    count,  # pages that the summaries have room for
    node_count,  # nodes that ``out`` has room for
    PAGES: tl.constexpr,
    MEANS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    node = tl.load(nodes + index)
    # all means of the node's pages
    at = tl.arange(0, PAGES * MEANS)
    row = (head * MEANS + at % MEANS) * count + tl.load(pages + index * PAGES + at // MEANS)
    d = tl.arange(0, BLOCK)
    means = tl.load(mean + row[:, None] * WIDTH + d[None, :], mask=d[None, :] < WIDTH, other=0.0)
    means = means.to(tl.float32)
    centre = tl.sum(means, 0)[None, :] / (MEANS * PAGES)
    apart = means - centre
    between = tl.sum(apart * apart, 0) / (MEANS * PAGES)

    row = head * count + tl.load(pages + index * PAGES + tl.arange(0, PAGES))
    within = tl.load(sigma + row[:, None] * WIDTH + d[None, :], mask=d[None, :] < WIDTH, other=0.0)
    within = within.to(tl.float32)
    deviation = tl.sqrt(tl.sum(within * within, 0) / PAGES + between)
    _store(node_mean, node_sigma, centre, deviation, head, node, node_count, limit, 1, WIDTH, BLOCK)

    d = tl.arange(0, VALUE_BLOCK)
    here = row[:, None] * VALUE_WIDTH + d[None, :]
    values = tl.load(value + here, mask=d[None, :] < VALUE_WIDTH, other=0.0).to(tl.float32)
    average = _saturate(tl.sum(values, 0) / PAGES, limit)
    there = (head * node_count + node) * VALUE_WIDTH + d
    tl.store(node_value + there, average, mask=d < VALUE_WIDTH)


@triton.jit
def _store(
    mean,
    sigma,
    centre,
    deviation,
    head,
    place,
    count,
    limit,
    MEANS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    d = tl.arange(0, BLOCK)
    row = (head * MEANS + tl.arange(0, MEANS)) * count + place
    there = row[:, None] * WIDTH + d[None, :]
    tl.store(mean + there, _saturate(centre, limit), mask=d[None, :] < WIDTH)
    there = (head * count + place) * WIDTH + d
    tl.store(sigma + there, _saturate(deviation, limit), mask=d < WIDTH)


@triton.jit
def _saturate(x, limit):
    """A value past the range of what it is stored in becomes its largest, never infinite."""
    return tl.minimum(tl.maximum(x, -limit), limit)
