"""Every kernel against the reference: in float64 what is simple, in float32 what the reference is.

The reference computes in float32 on the CPU, from the very numbers that the kernels read. Two pages
of the same weight may change places: decode steps are compared where both chose the same, and what
is attended to otherwise for the kernel's own choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from hip_kernels.attend import fused, reference
from hip_kernels.layout import (
    NODE_PAGES,
    PAGE_SIZE,
    SUB_PAGES,
    Choice,
    QueryBlocks,
    Selection,
    SparsePlan,
    Summaries,
)
from hip_kernels.select.scores import Scores
from hip_kernels.select.weigh import page_logits
from hip_kernels.summarize import reference as summarizing
from hip_kernels.summarize import triton as summaries_by_kernel
from torch import Tensor

from .cases import MODELS, TINY, Case, Cell, Layer, Model
from .exact import attend_exactly, difference, summarize_exactly
from .stages import stages_of

FULL, HALF = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Check:
    """One kernel on one shape, and how wrong it may be."""

    kernel: str
    shape: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit

    def __str__(self) -> str:
        verb = "is right" if self.passed else "is WRONG"
        return (
            f"{self.kernel} {verb} at {self.shape}: "
            f"largest error {self.error:.2g}, limit {self.limit:.2g}"
        )


def checks(device: torch.device, tiny: bool) -> Iterator[Check]:
    """All of them, as they are done."""
    plan = tiny_plan() if tiny else SparsePlan(second_look=2, parts=SUB_PAGES)
    context = 768 if tiny else 8192
    # at the end of a page, within one, at its start, and where there is little to choose from
    lengths = [context, context - 37, context - PAGE_SIZE + 1, context // 8]
    # the last begins and ends within pages
    chunks = [(context, PAGE_SIZE), (context - 37, 100)] if tiny else [(context - 37, 300)]
    for model, dtype in _shapes(device, tiny):
        decode = Cell(model, dtype, context, len(lengths))
        case = Case.make(decode, plan, device, lengths=lengths)
        yield from _summaries(case)
        yield from _scores(case)
        yield from _attention(case)
        far = Cell(model, dtype, 2560 if tiny else 16384, 2, nodes=True)
        few = replace(plan, beam=plan.budget_pages)
        yield from _attention(Case.make(far, few, device, lengths=[far.context, far.context - 70]))
        far = Cell(model, dtype, far.context, 1, PAGE_SIZE if tiny else 300, nodes=True)
        yield from _attention(Case.make(far, few, device, lengths=[far.context]))
        for length, chunk in chunks:
            prefill = Cell(model, dtype, context, 1, chunk)
            yield from _attention(Case.make(prefill, plan, device, lengths=[length]))


def tiny_plan() -> SparsePlan:
    """Prunes where a context has no more than a handful of pages."""
    return SparsePlan(sink_pages=1, window_pages=1, budget_pages=2, second_look=2, parts=SUB_PAGES)


def _shapes(device: torch.device, tiny: bool) -> list[tuple[Model, torch.dtype]]:
    if tiny:
        return [(TINY, FULL)] + ([(TINY, HALF)] if device.type == "cuda" else [])
    # float32 takes twice the shared memory: half the width
    return [(Model("narrow", 8, 2, 64), FULL), *((model, HALF) for model in MODELS)]


def _shape(case: Case) -> str:
    dtype = str(case.cell.dtype).removeprefix("torch.")
    rows = "" if case.cell.decodes else f", chunk {case.cell.chunk}"
    lengths = "+".join(map(str, case.lengths))
    nodes = ", nodes" if case.cell.nodes else ""
    return f"{case.cell.model} {dtype}, lengths {lengths}{rows}{nodes}"


def _limit(case: Case) -> float:
    return 1e-4 if case.cell.dtype == FULL else 2e-2


def _summaries(case: Case) -> Iterator[Check]:
    layer = case.layers[0]
    rows = zip(case.table, case.lengths, strict=True)
    pages = torch.cat([row[: length // PAGE_SIZE] for row, length in rows])
    means = layer.summaries.mean.shape[1]
    expected = summarize_exactly(layer.kv, pages, means)
    found = layer.summaries.take(pages).tensors
    errors = [difference(*pair) for pair in zip(found, expected, strict=True)]
    yield Check("summarize", _shape(case), max(errors), _limit(case))

    of_node = pages[: len(pages) // NODE_PAGES * NODE_PAGES].view(-1, NODE_PAGES)
    nodes = torch.arange(len(of_node), device=pages.device)

    def empty() -> Summaries:
        heads, _, _, width = layer.summaries.mean.shape
        return Summaries.empty(
            len(nodes), heads, width, width, means=1,
            dtype=layer.summaries.mean.dtype, device=pages.device,
        )  # fmt: skip

    by_kernel, by_reference = empty(), empty()
    summaries_by_kernel.pool(layer.summaries, of_node, nodes, by_kernel)
    summarizing.pool(layer.summaries, of_node, nodes, by_reference)
    errors = [
        difference(*pair) for pair in zip(by_kernel.tensors, by_reference.tensors, strict=True)
    ]
    yield Check("pool", _shape(case), max(errors), _limit(case))


def _scores(case: Case) -> Iterator[Check]:
    layer, host = case.layers[0], case.on_host().layers[0]
    (blocks,) = case.blocks(True)
    stages = stages_of(lambda: _attend(case, layer, blocks, torch.empty_like(layer.out)))
    stage = next(stage for stage in stages if stage.name == "weigh")
    out = next(each for each in stage.given if isinstance(each, Scores))
    for tensor in (out.page, out.parts, out.spread):
        tensor.fill_(math.nan)
    stage()
    errors = []
    for number, count in enumerate(blocks.page.tolist()):
        near = host.summaries.take(blocks.table[number, :count].cpu())
        rows = case.scale * host.query[int(blocks.tokens[number])]
        rows = rows.unflatten(0, (case.cell.model.kv_heads, -1))
        expected = page_logits(rows, near, case.plan)
        found = out.page[number, :, :count].cpu().view_as(expected.page)
        parts = out.parts[:, number, :, :count].cpu().reshape(expected.parts.shape)
        errors += [difference(found, expected.page), difference(parts, expected.parts)]
        beyond = out.page[number, :, count:]
        errors.append(0.0 if bool(beyond.isnan().all()) else math.inf)
    yield Check("weigh", _shape(case), max(errors), _limit(case))


def _attention(case: Case) -> Iterator[Check]:
    """Blocks that prune and blocks that do not, as the server's door takes them."""
    layer, host = case.layers[0], case.on_host()
    exact = attend_exactly(case, layer)
    for sparse in (True, False):
        for blocks, there in zip(case.blocks(sparse), host.blocks(sparse), strict=True):
            rows = "decode" if blocks.tokens.shape[1] == 1 else "prefill"
            if sparse:
                yield from _sparse(case, layer, blocks, host.layers[0], there, rows)
            else:
                out = torch.full_like(layer.out, math.nan)
                _attend(case, layer, blocks, out)
                error = difference(_rows(out, blocks), _rows(exact, blocks))
                yield Check(f"attend ({rows}, keep-all)", _shape(case), error, _limit(case))


def _sparse(
    case: Case, layer: Layer, blocks: QueryBlocks, host: Layer, there: QueryBlocks, rows: str
) -> Iterator[Check]:
    out, expected = torch.full_like(layer.out, math.nan), torch.empty_like(host.out)
    found = _attend(case, layer, blocks, out)
    given = host.query, host.kv, host.summaries, there
    more = case.scale, expected, host.nodes
    own = reference.attend(*given, case.plan, *more)
    assert found is not None
    assert own is not None
    mine, theirs = found.choice.entries.cpu(), own.choice.entries
    moved = ~(mine.unsqueeze(-1) == theirs.unsqueeze(-2)).any(-1)
    # not the error of a number: the share of entries that others would have chosen
    few = 0.01 if case.cell.dtype == FULL else 0.05
    yield Check(f"choose ({rows})", _shape(case), float(moved.float().mean()), few)
    wrong = difference(found.choice.correction.cpu(), own.choice.correction)
    yield Check(f"choose ({rows}, correction)", _shape(case), wrong, 10 * _limit(case))
    if rows == "decode":
        same = ~moved.flatten(1).any(1)
        errors = [
            difference(_rows(out, blocks).cpu()[same], _rows(expected, there)[same]),
            difference(
                _real(found.estimated, blocks).cpu()[same], _real(own.estimated, there)[same]
            ),
        ]
        yield Check(f"attend ({rows})", _shape(case), max(errors), _limit(case))

    # what is used again are whole pages
    whole = replace(case, plan=replace(case.plan, parts=1))
    found = _attend(whole, layer, blocks, out)
    assert found is not None
    choice = Choice(found.choice.entries.cpu(), found.choice.correction.float().cpu())
    out = torch.full_like(layer.out, math.nan)
    found = _attend(whole, layer, blocks, out, found.choice)
    again = reference.attend(*given, whole.plan, *more, choice)
    assert found is not None
    assert again is not None
    errors = [
        difference(_rows(out, blocks).cpu(), _rows(expected, there)),
        difference(_real(found.estimated, blocks).cpu(), _real(again.estimated, there)),
    ]
    what = f"attend ({rows}, held choice)" if rows == "decode" else f"attend ({rows})"
    yield Check(what, _shape(case), max(errors), _limit(case))


def _attend(
    case: Case, layer: Layer, blocks: QueryBlocks, out: Tensor, choice: Choice | None = None
) -> Selection | None:
    plan, scale = case.plan, case.scale
    return fused.attend(
        layer.query, layer.kv, layer.summaries, blocks, plan, scale, out, layer.nodes, choice
    )


def _rows(out: Tensor, blocks: QueryBlocks) -> Tensor:
    """The rows of the flat batch that blocks write."""
    return out[blocks.tokens[blocks.position >= 0]]


def _real(estimated: Tensor, blocks: QueryBlocks) -> Tensor:
    """estimated [N, Hkv, R * G] -> of rows that are no padding."""
    rows = blocks.tokens.shape[1]
    split = estimated.unflatten(2, (rows, -1)).transpose(1, 2)  # [N, R, Hkv, G]
    return split[blocks.position >= 0]
