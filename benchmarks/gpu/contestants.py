"""What is timed on a shape: each of our steps alone, all of them together, and what they replace.

``cached`` steps attend to what an earlier ``refresh`` step chose; both attend alike, so that
``attend`` stands once, and ``select`` of a cached step is what weighs the pages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from hip_kernels.attend import fused
from hip_kernels.layout import NODE_PAGES, PAGE_SIZE, Choice, QueryBlocks, Selection, SparsePlan
from hip_kernels.summarize.triton import summarize

from .cases import Case, Cell, Layer
from .clock import Call
from .stages import Stage, stages_of

Timed = dict[tuple[str, str], Call]  # (what, step) -> call


def ours(case: Case) -> Timed:
    """Our steps, and our kernels that keep every page."""
    sparse, every = case.blocks(True), case.blocks(False)
    assert all(fused.serves(block, case.plan, case.cell.model.width) for block in sparse)
    found = _decode(case, sparse) if case.cell.decodes else _prefill(case, sparse)
    step = "decode" if case.cell.decodes else "prefill"
    found["keep_all", step] = lambda layer: [_attend(case, layer, block) for block in every]
    return found


def _decode(case: Case, blocks: list[QueryBlocks]) -> Timed:
    refresh, cached = _steps(case, blocks)
    newest = torch.unique(case.table[:, case.cell.context // PAGE_SIZE - 1])
    return {
        ("summarize", "refresh"): lambda layer: summarize(layer.kv, newest, layer.summaries),
        ("select", "refresh"): refresh.only("select"),
        ("select", "cached"): cached.only("select"),
        ("attend", "cached"): cached.only("attend"),
        ("total", "refresh"): refresh.total,
        ("total", "cached"): cached.total,
    }


def _prefill(case: Case, blocks: list[QueryBlocks]) -> Timed:
    chunk, _ = _steps(case, blocks)
    end = case.cell.context // PAGE_SIZE
    fresh = case.table[0, end - case.cell.chunk // PAGE_SIZE : end].contiguous()
    return {
        ("summarize", "prefill"): lambda layer: summarize(layer.kv, fresh, layer.summaries),
        ("select", "prefill"): chunk.only("select"),
        ("attend", "prefill"): chunk.only("attend"),
        ("total", "prefill"): chunk.total,
    }


@dataclass(frozen=True)
class Step:
    """One step of every layer: as a whole, and the stages of it."""

    total: Call
    stages: dict[int, list[Stage]]  # by the layer's id

    @classmethod
    def of(cls, case: Case, total: Call) -> Step:
        return cls(total, {id(layer): stages_of(partial(total, layer)) for layer in case.layers})

    def only(self, kind: str) -> Call:
        def run(layer: Layer) -> None:
            for stage in self.stages[id(layer)]:
                if stage.kind == kind:
                    stage()

        return run


def _steps(case: Case, blocks: list[QueryBlocks]) -> tuple[Step, Step]:
    """One that chooses, and one that attends to what the first has chosen."""
    choices = _choices(case, blocks)

    def refresh(layer: Layer) -> None:
        for block in blocks:
            _attend(case, layer, block)

    def cached(layer: Layer) -> None:
        for block, choice in zip(blocks, choices[id(layer)], strict=True):
            _attend(case, layer, block, choice)

    return Step.of(case, refresh), Step.of(case, cached)


def _choices(case: Case, blocks: list[QueryBlocks]) -> dict[int, list[Choice]]:
    """What each layer chooses, block by block."""
    found = {}
    case = replace(case, plan=replace(case.plan, parts=1))  # what is used again are whole pages
    for layer in case.layers:
        selections = [_attend(case, layer, block) for block in blocks]
        found[id(layer)] = [selection.choice for selection in selections if selection is not None]
    return found


def _attend(
    case: Case, layer: Layer, block: QueryBlocks, choice: Choice | None = None
) -> Selection | None:
    plan = case.plan if choice is None else replace(case.plan, parts=1)
    given = layer.query, layer.kv, layer.summaries, block, plan, case.scale
    return fused.attend(*given, layer.out, layer.nodes, choice)


def moved(cell: Cell, plan: SparsePlan, what: str, step: str) -> int:
    """Bytes that a decode step must move; 0 where a chunk's arithmetic is what takes time."""
    if not cell.decodes:
        return 0
    of_head = cell.model.width * cell.model.kv_heads * cell.batch
    page = PAGE_SIZE * of_head * cell.dtype.itemsize  # keys, or values
    rows = of_head * cell.stored.itemsize  # one mean of every page
    context = cell.pages - 1
    weighed = context
    nodes = context // NODE_PAGES if cell.nodes else 0
    if nodes:
        weighed = min(plan.beam, nodes) * NODE_PAGES + plan.window_pages + NODE_PAGES
    weigh = (weighed * 5 + nodes * 2) * rows
    look = min(plan.second_look * plan.budget_pages, context) * page
    attend = min(plan.exact_pages, cell.pages) * 2 * page + (weighed + nodes) * rows
    parts = {
        ("summarize", "refresh"): 2 * page + 6 * rows,
        ("select", "refresh"): weigh + look,
        ("select", "cached"): weigh,
        ("attend", "cached"): attend,
        ("total", "refresh"): weigh + look + attend,
        ("total", "cached"): weigh + attend,
    }
    return parts.get((what, step), cell.context * 2 * page // PAGE_SIZE)
