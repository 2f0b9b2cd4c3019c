"""The front door: one function an operation, by kernels of our own where the tensors are CUDA's."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from hip_kernels.attend import reference as attending
from hip_kernels.blocks import plan_blocks
from hip_kernels.layout import Choice, QueryBlocks, Selection, SparsePlan, Summaries
from hip_kernels.steps import DecodeSteps
from hip_kernels.stored import StoredKV

__all__ = ["attend", "attend_steps", "plan_blocks", "pool", "summarize"]


def attend(
    query: Tensor,
    kv: StoredKV,
    summaries: Summaries,
    blocks: QueryBlocks,
    plan: SparsePlan,
    scale: float,
    out: Tensor,
    nodes: Summaries | None = None,
    choice: Choice | None = None,
) -> Selection | None:
    """Attend the query blocks and write their rows of ``out``.

    query [T, Hq, D]; out [T, Hq, Dv]. ``nodes`` are the summaries that ``blocks.nodes`` leads to;
    ``choice`` of an earlier step is attended to, where it is given, instead of a new one. Returns
    what was selected, None where every page was kept.
    """
    if query.is_cuda:
        from hip_kernels.attend import fused

        if fused.serves(blocks, plan, query.shape[2]):
            return fused.attend(query, kv, summaries, blocks, plan, scale, out, nodes, choice)
    return attending.attend(query, kv, summaries, blocks, plan, scale, out, nodes, choice)


def attend_steps(
    query: Tensor,
    kv: StoredKV,
    summaries: Summaries,
    steps: DecodeSteps,
    choice: Choice,
    plan: SparsePlan,
    scale: float,
    out: Tensor,
    estimated: Tensor,
    nodes: Summaries | None = None,
) -> None:
    """Attend decode steps of every kind in the same launches, where ``plan.has_kernels``.

    query [T, Hq, D]; out [T, Hq, Dv]. A step that prunes attends to what stands in its row of
    ``choice`` [R, ...]; one that does not reuse that chooses it anew, and for those that do
    ``plan.beam`` has as many nodes as a choice has pages. ``nodes`` are the summaries
    that ``steps.nodes`` leads to; ``estimated`` [B, Hq] becomes the share of each row's softmax
    that went to estimated pages. Nothing waits for the GPU.
    """
    from hip_kernels.attend import fused

    fused.attend_steps(query, kv, summaries, steps, choice, plan, scale, out, estimated, nodes)


def summarize(kv: StoredKV, pages: Tensor, out: Summaries) -> None:
    """Summarise complete pages [C], physical, from stored keys and values into ``out``.

    -1 is none: kernels pass it over, so that as many are launched for every decode step.
    """
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
