"""What kernels ask of their arguments, at the launchers' doors."""

from __future__ import annotations

import torch
from torch import Tensor

from hip_kernels.layout import PAGE_SIZE, Choice, Summaries
from hip_kernels.steps import DecodeSteps


def check(
    name: str, what: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype | None = None
) -> None:
    """Assert a shape (None is any size), no gaps, and a dtype."""
    fits = what.ndim == len(shape) and all(
        wanted in (None, size) for wanted, size in zip(shape, what.shape, strict=True)
    )
    assert fits, f"{name} has the shape {tuple(what.shape)}; it must be {shape}"
    assert what.is_contiguous(), f"{name} has gaps: its strides are {what.stride()}"
    assert dtype in (None, what.dtype), f"{name} is {what.dtype}; it must be {dtype}"


def check_summaries(name: str, of: Summaries, heads: int) -> None:
    """Assert that the three tensors belong together."""
    means, pages, width = of.mean.shape[1:]
    assert PAGE_SIZE % means == 0, f"{name}.mean has {means} means a page of {PAGE_SIZE} tokens"
    check(f"{name}.mean", of.mean, (heads, means, pages, width))
    check(f"{name}.sigma", of.sigma, (heads, pages, width), of.mean.dtype)
    check(f"{name}.value", of.value, (heads, pages, None), of.mean.dtype)


def check_steps(name: str, of: DecodeSteps) -> None:
    """Assert that the tensors belong together."""
    for field in ("token", "position", "page", "row"):
        check(f"{name}.{field}", getattr(of, field), (len(of),), torch.int64)
    check(f"{name}.reuses", of.reuses, (len(of),), torch.int32)
    check(f"{name}.table", of.table, (len(of), None), torch.int64)
    if of.nodes is not None:
        check(f"{name}.nodes", of.nodes, (len(of), None), torch.int64)


def check_choice(name: str, of: Choice, kv_heads: int, heads: int) -> None:
    """Assert that both tensors are of these heads."""
    rows, group = len(of.entries), heads // kv_heads
    check(f"{name}.entries", of.entries, (rows, kv_heads, None), torch.int64)
    check(f"{name}.correction", of.correction, (rows, kv_heads, group), torch.float32)
