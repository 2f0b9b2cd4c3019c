"""What kernels share: how rows are loaded, capped, and padded for tensor cores."""

from __future__ import annotations

import triton
import triton.language as tl

# a matrix product on tensor cores has at least so many rows
LEAST_ROWS = 16
PAGES_A_TILE = 64


def rows_of_group(group: int) -> int:
    """How many rows a tile has for the query heads of one KV head."""
    return max(LEAST_ROWS, int(triton.next_power_of_2(group)))


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
