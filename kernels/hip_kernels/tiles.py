"""What kernels share: how rows are loaded, capped, and padded for tensor cores."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# a matrix product on tensor cores has at least so many rows
LEAST_ROWS = 16
PAGES_A_TILE = 64
# chosen or listed pages
ENTRIES_A_TILE = 64


def rows_of_group(group: int) -> int:
    """How many rows a tile has for the query heads of one KV head."""
    return max(LEAST_ROWS, int(triton.next_power_of_2(group)))


@cache
def _arrivals(device: torch.device, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int32, device=device)


def arrivals(device: torch.device, count: int) -> Tensor:
    """Counters for ``arrives_last``, at least ``count``: 0, and every kernel leaves them so."""
    return _arrivals(device, int(triton.next_power_of_2(max(count, 1024))))


@triton.jit
def load_rows(rows, row, seen, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [TILE] of a pool, 0 where not seen -> [TILE, BLOCK]."""
    d = tl.arange(0, BLOCK)
    real = seen[:, None] & (d < WIDTH)[None, :]
    return tl.load(rows + row[:, None] * WIDTH + d[None, :], mask=real, other=0.0)


@triton.jit
def soft_capped(logit, cap):
    """``cap * tanh(logit / cap)``."""
    return cap * (2 * tl.sigmoid(2 * logit / cap) - 1)


@triton.jit
def log_sum_exp(x):
    """Of each row of x [ROWS, N]; -inf where all of it is."""
    top = tl.max(x, 1)
    origin = tl.where(top > float("-inf"), top, 0.0)
    return origin + tl.log(tl.sum(tl.exp(x - origin[:, None]), 1))


@triton.jit
def log_add(a, b):
    top = tl.maximum(a, b)
    origin = tl.where(top > float("-inf"), top, 0.0)
    return origin + tl.log(tl.exp(a - origin) + tl.exp(b - origin))


@triton.jit
def mass_of(masses, real, count, ROWS: tl.constexpr, TILE: tl.constexpr):
    """The log-sum-exp of the first ``count`` masses behind each of the pointers [ROWS]."""
    total = tl.full((ROWS,), float("-inf"), tl.float32)
    for start in range(0, count, TILE):
        tile = start + tl.arange(0, TILE)
        known = real[:, None] & (tile < count)[None, :]
        more = tl.load(masses[:, None] + tile[None, :], mask=known, other=float("-inf"))
        total = log_add(total, log_sum_exp(more))
    return total


@triton.jit
def arrives_last(counter, count):
    """Whether a program is the last of ``count``: it may read what the others stored.

    The counter is 0 before and after.
    """
    tl.debug_barrier()
    before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    last = before == count - 1
    if last:
        tl.store(counter, 0)
    tl.debug_barrier()
    return last
