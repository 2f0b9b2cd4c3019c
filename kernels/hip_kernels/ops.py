"""The front door: one function an operation, by kernels of our own where the tensors are CUDA's."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from hip_kernels.attend.reference import attend
from hip_kernels.blocks import plan_blocks
from hip_kernels.layout import PagedKV, Summaries

__all__ = ["attend", "plan_blocks", "pool", "summarize"]


def summarize(kv: PagedKV, pages: Tensor, out: Summaries) -> None:
    """Summarise complete pages [C], physical, from stored keys and values into ``out``."""
    _summaries(out).summarize(kv, pages, out)


def pool(summaries: Summaries, pages: Tensor, nodes: Tensor, out: Summaries) -> None:
    """Summarise nodes [C] from the summaries of their pages [C, n], in order, into ``out``."""
    _summaries(out).pool(summaries, pages, nodes, out)


def _summaries(of: Summaries) -> ModuleType:
    # a CPU build of torch comes without triton
    if of.mean.is_cuda:
        from hip_kernels.summarize import triton

        return triton
    from hip_kernels.summarize import reference

    return reference
