"""The prefill kernels against the reference, on Triton's interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hip_kernels.attend import fused, reference
from hip_kernels.attend import prefill as attending
from hip_kernels.attend import triton as sharing
from hip_kernels.blocks import plan_blocks
from hip_kernels.layout import PAGE_SIZE, QueryBlocks, Selection, SparsePlan, Summaries
from hip_kernels.select import best
from hip_kernels.select import prefill as weighing
from hip_kernels.select import prefill_enough as enough
from hip_kernels.select import prefill_tiles as tiles
from hip_kernels.select import triton as estimating
from hip_kernels.select.parts import Part, every_page
from hip_kernels.select.weigh import LEAST, NEVER, Context, best_of_rows
from hip_kernels.stored import PagedKV
from torch import Tensor

from tests.kernels.door import make_requests, scatter, with_nodes
from tests.kernels.test_attend import queries

HALF, FULL, EIGHTH = torch.float16, torch.float32, torch.float8_e4m3fn
PLAN = SparsePlan(sink_pages=1, window_pages=2, budget_pages=3)
SCALE = 0.2

# a chunk that begins and ends inside pages, and extends within a page
SHAPES = [(600, 105), (515, 10), (470, 8)]


@dataclass
class Case:
    """Blocks of several requests, scattered over a pool of which nothing else may be read."""

    query: Tensor
    kv: PagedKV
    summaries: Summaries
    blocks: list[QueryBlocks]
    heads: int
    value_width: int
    nodes: Summaries | None

    @classmethod
    def of(
        cls,
        heads: int = 4,
        kv_heads: int = 2,
        width: int = 16,
        value_width: int = 16,
        means: int = 4,
        dtype: torch.dtype = FULL,
        kv_dtype: torch.dtype = FULL,
        scales: tuple[float, float] = (1.0, 1.0),
        shapes: list[tuple[int, int]] = SHAPES,
        sparse_from: int | None = 0,
        nodes_from: int | None = None,
    ) -> Case:
        requests = make_requests(shapes, heads=kv_heads, width=width, value_width=value_width)
        for request in requests:
            request.key, request.value = request.key.to(kv_dtype), request.value.to(kv_dtype)
        here = scatter(requests, means=means, scales=scales)
        nodes, node_table = None, None
        if nodes_from is not None:
            nodes, node_table = with_nodes(here, requests, 0)
        blocks = plan_blocks(
            [request.prefix for request in requests],
            [request.length for request in requests],
            here.page_table,
            sparse_from=sparse_from,
            sparse_decode_from=None,
            nodes_from=nodes_from,
            node_table=node_table,
        )
        blocks = [block for block in blocks if block.tokens.shape[1] == PAGE_SIZE]
        stored = FULL if dtype == FULL else HALF
        summaries = Summaries(*(tensor.to(stored) for tensor in here.summaries.tensors))
        nodes = nodes and Summaries(*(tensor.to(stored) for tensor in nodes.tensors))
        query = queries(requests, heads, width).to(dtype)
        return cls(query, here.kv, summaries, blocks, heads, value_width, nodes)

    @property
    def group(self) -> int:
        return self.heads // self.kv.kv_heads

    def poisoned(self) -> tuple[PagedKV, Summaries]:
        """Not a number, where nobody has written."""

        def poison(rows: Tensor, rubbish: float) -> Tensor:
            unwritten = rows.float() == torch.tensor(rubbish).to(rows.dtype).float()
            return rows.float().masked_fill(unwritten, math.nan).to(rows.dtype)

        key, value = (poison(rows, 400.0) for rows in (self.kv.key, self.kv.value))
        summaries = Summaries(*(poison(tensor, 1e4) for tensor in self.summaries.tensors))
        return replace(self.kv, key=key, value=value), summaries

    def pages(self, blocks: QueryBlocks) -> Part:
        return every_page(self.poisoned()[1], blocks)

    def context(self, blocks: QueryBlocks, plan: SparsePlan) -> Context:
        weigher = reference.Weigher(self.summaries, None, blocks, plan)
        rows = reference.rows_of(self.query, blocks, self.kv.kv_heads) * SCALE
        return weigher.weigh(rows, blocks, None)

    def by_heads(self, found: Tensor) -> Tensor:
        """[N, Hkv, R * G] -> [N, Hq, R]."""
        split = found.unflatten(2, (PAGE_SIZE, self.group))
        return split.transpose(2, 3).flatten(1, 2)

    def mass(self, blocks: QueryBlocks, plan: SparsePlan) -> Tensor:
        out = nothing(len(blocks), self.heads, PAGE_SIZE)
        weighing.mass(self.query, [self.pages(blocks)], blocks, plan, SCALE, out)
        return out

    def score(self, blocks: QueryBlocks, plan: SparsePlan, mass: Tensor) -> Tensor:
        out = nothing(len(blocks), self.kv.kv_heads, blocks.table.shape[1])
        weighing.score(self.query, self.pages(blocks), blocks, plan, SCALE, mass, out)
        return out

    def attend(
        self, blocks: QueryBlocks, plan: SparsePlan, chosen: Tensor
    ) -> tuple[Tensor, Tensor]:
        out = nothing(len(self.query), self.heads, self.value_width).to(self.query.dtype)
        share = nothing(len(blocks), self.heads, PAGE_SIZE)
        given = self.poisoned()[0], [self.pages(blocks)], blocks, chosen, plan, SCALE, out, share
        attending.attend(self.query, *given)
        return out, share

    def expected(self, blocks: QueryBlocks, plan: SparsePlan) -> tuple[Tensor, Selection | None]:
        out = nothing(len(self.query), self.heads, self.value_width)
        given = self.query, self.kv, self.summaries, blocks, plan, SCALE
        return out, reference.attend(*given, out, self.nodes)


def nothing(*shape: int) -> Tensor:
    return torch.full(shape, math.nan)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    bits = 2e-5 if dtype == FULL else 1e-2
    torch.testing.assert_close(found.float(), expected, rtol=bits, atol=bits, equal_nan=True)


@pytest.fixture(autouse=True)
def kernels(
    interpreted: Callable[[ModuleType], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (estimating, weighing, enough, sharing, attending):
        interpreted(module)
    # the contexts of these tests are several tiles, and no multiple of one
    monkeypatch.setattr(tiles, "TILE", 8)


CASES = [
    {},
    {"heads": 2, "width": 64, "value_width": 80, "means": 1},
    {"heads": 6, "width": 80, "value_width": 48, "dtype": HALF, "kv_dtype": HALF},
    {"heads": 8, "kv_heads": 1, "width": 64, "dtype": HALF, "kv_dtype": EIGHTH,
     "scales": (0.5, 2.0)},
    {"heads": 2, "kv_heads": 1, "width": 160, "value_width": 136},
]  # fmt: skip
SETTINGS = [
    {},
    {"remainder": "quadratic", "logit_cap": 3.0},
    {"remainder": "mean", "sink_pages": 3, "window_pages": 1},
    {"remainder": "none", "logit_cap": 3.0},
    {"sink_pages": 0, "window_pages": 0},
    {"budget_pages": 0},
]
BOTH = [*((case, {}) for case in CASES), *(({}, settings) for settings in SETTINGS[1:])]


@pytest.mark.parametrize(("case", "settings"), BOTH[:8], ids=str)
def test_mass_and_scores_equal_the_reference(
    case: dict[str, Any], settings: dict[str, Any]
) -> None:
    here, plan = Case.of(**case), replace(PLAN, **settings)
    for blocks in here.blocks:
        context = here.context(blocks, plan)
        expected = context.mass()
        found = here.mass(blocks, plan)
        wanted = here.by_heads(expected.squeeze(-1).transpose(0, 1))
        close(found, wanted, here.query.dtype)

        share = best_of_rows(context.logits.page - expected, blocks)
        scores = here.score(blocks, plan, found)
        at = context.page.expand_as(share).transpose(0, 1)
        wanted = scores.new_full((*scores.shape[:2], scores.shape[2] + 1), NEVER)
        # what is no page before the block lands in a column that is thrown away
        wanted.scatter_(2, at.where(at >= 0, scores.shape[2]), share.transpose(0, 1))
        close(scores, wanted[..., :-1], here.query.dtype)


# in half precision a share may come to the other side of the bound
@pytest.mark.parametrize("case", [case for case in CASES if "dtype" not in case], ids=str)
def test_what_is_enough_equals_the_reference(case: dict[str, Any]) -> None:
    dropped = 0
    # more than a tile of choices, of which some are none
    plan = replace(PLAN, budget_pages=11, top_p=0.8)
    here = Case.of(**case)
    for blocks in here.blocks:
        mass = here.mass(blocks, plan)
        score = here.score(blocks, plan, mass)
        chosen, keys = best.best_pages(score, blocks.page, plan)
        dropped += int((chosen >= 0).sum())
        given = here.query, here.poisoned()[1], blocks, plan, SCALE, mass, chosen, keys
        enough.keep_enough(*given)
        dropped -= int((chosen >= 0).sum())
        _, selection = here.expected(blocks, plan)
        assert selection is not None
        expected = selection.choice.entries
        for found, wanted in zip(chosen.flatten(0, 1), expected.flatten(0, 1), strict=True):
            assert {*found.tolist()} - {-1} == {*wanted.tolist()} - {-1}
    assert dropped > 0


@pytest.mark.parametrize(("case", "settings"), BOTH, ids=str)
def test_attention_equals_the_reference(case: dict[str, Any], settings: dict[str, Any]) -> None:
    here, plan = Case.of(**case), replace(PLAN, **settings)
    for blocks in here.blocks:
        expected, selection = here.expected(blocks, plan)
        assert selection is not None
        chosen = selection.choice.entries.contiguous()
        found, share = here.attend(blocks, plan, chosen)
        # rows of other blocks are not touched
        close(found, expected, here.query.dtype)
        wanted = here.by_heads(selection.estimated)
        real = (blocks.position >= 0).unsqueeze(1)
        close(share, wanted.where(real, 0), here.query.dtype)


def test_blocks_near_the_beginning_attend_to_what_there_is() -> None:
    here = Case.of(shapes=[(0, 420), (0, 30), (70, 20)])
    plan = replace(PLAN, sink_pages=2)
    for blocks in here.blocks:
        expected, selection = here.expected(blocks, plan)
        assert selection is not None
        found, share = here.attend(blocks, plan, selection.choice.entries.contiguous())
        close(found, expected, FULL)
        mass = here.mass(blocks, plan)
        scores = here.score(blocks, plan, mass)
        assert (mass[blocks.page == 0] == NEVER).all()
        assert (scores[blocks.page == 0] == NEVER).all()
        for of in (mass, scores, share):
            assert not of.isnan().any()


@pytest.mark.parametrize("case", [{}, CASES[3]], ids=str)
def test_weighed_chosen_and_attended_by_kernels(case: dict[str, Any]) -> None:
    here = Case.of(**case)
    for blocks in here.blocks:
        expected, selection = here.expected(blocks, PLAN)
        assert selection is not None
        scores = here.score(blocks, PLAN, here.mass(blocks, PLAN)).clamp(min=LEAST)
        page = torch.arange(scores.shape[2])
        between = page < (blocks.page - PLAN.window_pages)[:, None]
        between &= page >= PLAN.sink_pages
        best, chosen = scores.masked_fill(~between.unsqueeze(1), NEVER).topk(PLAN.budget_pages)
        chosen = chosen.where(best > NEVER, len(page)).sort(-1).values
        chosen = chosen.where(chosen < len(page), -1)
        assert torch.equal(chosen, selection.choice.entries)
        close(here.attend(blocks, PLAN, chosen)[0], expected, here.query.dtype)


@pytest.mark.parametrize("dtype", [FULL, HALF])
def test_a_search_through_nodes_equals_the_reference(dtype: torch.dtype) -> None:
    kinds = {"dtype": dtype, "kv_dtype": dtype, "heads": 2, "kv_heads": 1}
    here = Case.of(**kinds, width=80, value_width=48, shapes=[(2747, 69)], nodes_from=0)
    plan = replace(PLAN, beam=2)
    [blocks] = here.blocks
    expected, selection = here.expected(blocks, plan)
    assert selection is not None
    kv, summaries = here.poisoned()
    out = nothing(*expected.shape).to(dtype)
    given = here.query, kv, summaries, blocks, plan, SCALE, out, here.nodes
    found = fused.attend(*given)
    assert found is not None
    assert torch.equal(found.choice.entries, selection.choice.entries)
    close(out, expected, dtype)
    real = (blocks.position >= 0).unsqueeze(1)
    wanted = here.by_heads(selection.estimated).where(real, 0)
    close(here.by_heads(found.estimated), wanted, dtype)


@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_page_is_attended_exactly(case: dict[str, Any], cap: float) -> None:
    here = Case.of(**case, sparse_from=None, shapes=[(200, 100), (70, 20), (0, 30)])
    for blocks in here.blocks:
        expected, selection = here.expected(blocks, replace(PLAN, logit_cap=cap))
        assert selection is None
        out = nothing(len(here.query), here.heads, here.value_width).to(here.query.dtype)
        kv, _ = here.poisoned()
        attending.attend_all(here.query, kv, blocks, SCALE, cap, out)
        close(out, expected, here.query.dtype)


def test_the_same_bits_twice() -> None:
    here = Case.of(dtype=HALF, kv_dtype=HALF)
    blocks = here.blocks[-1]
    chosen = torch.tensor([1, 4, -1]).expand(len(blocks), 2, 3).contiguous()
    mass = here.mass(blocks, PLAN)
    assert torch.equal(mass, here.mass(blocks, PLAN))
    assert torch.equal(here.score(blocks, PLAN, mass), here.score(blocks, PLAN, mass))
    found, share = here.attend(blocks, PLAN, chosen)
    again, same = here.attend(blocks, PLAN, chosen)
    assert torch.equal(again.nan_to_num(), found.nan_to_num())
    assert torch.equal(same, share)


@pytest.mark.parametrize("size", [1e-6, 1000.0])
def test_deviations_that_float16_cannot_square(size: float) -> None:
    here = Case.of(dtype=HALF, shapes=[(300, 20)])
    here.summaries.sigma.fill_(size)
    [blocks] = here.blocks
    wanted = here.by_heads(here.context(blocks, PLAN).mass().squeeze(-1).transpose(0, 1))
    close(here.mass(blocks, PLAN), wanted, HALF)


PART = Part(Summaries.empty(4, 2, 16, 24), torch.zeros(1, 3, dtype=torch.int64))


def given(change: dict[str, Any]) -> dict[str, Any]:
    tokens = torch.zeros(2, PAGE_SIZE, dtype=torch.int64)
    page, table = torch.ones(2, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)
    kv = PagedKV(torch.empty(256, 2, 16), torch.empty(256, 2, 24))
    return {
        "query": torch.empty(5, 4, 16),
        "kv": kv,
        "part": PART,
        "parts": [change.get("part", PART)],
        "blocks": QueryBlocks(tokens, tokens, page, table, None, page),
        "chosen": torch.zeros(2, 2, 3, dtype=torch.int64),
        "plan": PLAN,
        "scale": 1.0,
        "mass": torch.empty(2, 4, PAGE_SIZE),
        "out": torch.empty(5, 4, 24),
        "estimated": torch.empty(2, 4, PAGE_SIZE),
    } | change


def asks(launcher: Callable[..., None], change: dict[str, Any]) -> None:
    names = launcher.__code__.co_varnames[: launcher.__code__.co_argcount]
    launcher(**{name: value for name, value in given(change).items() if name in names})


NARROW = replace(PART, summaries=Summaries.empty(4, 2, 16, 16))
SHORT = replace(given({})["blocks"], page=torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("launcher", "name", "change"),
    [
        (weighing.mass, "query", {"query": torch.empty(5, 4, 8)}),
        (weighing.mass, "query", {"query": torch.empty(5, 3, 16)}),
        (weighing.mass, "blocks.page", {"blocks": SHORT}),
        (weighing.mass, "plan.remainder", {"plan": replace(PLAN, remainder="log_cosh")}),
        (weighing.mass, "out", {"out": torch.empty(2, 4, 1)}),
        (weighing.score, "mass", {"mass": torch.empty(2, 2, PAGE_SIZE)}),
        (weighing.score, "out", {"out": torch.empty(2, 2, 5)}),
        (attending.attend, "chosen", {"chosen": torch.zeros(2, 2, 3)}),
        (attending.attend, "estimated", {"estimated": torch.empty(2, 4)}),
        (attending.attend, "summaries.value", {"part": NARROW}),
        (attending.attend, "out", {"out": torch.empty(5, 4, 16)}),
    ],
)
def test_a_wrong_argument_is_named(
    launcher: Callable[..., None], name: str, change: dict[str, Any]
) -> None:
    with pytest.raises(AssertionError, match=rf"^{name} "):
        asks(launcher, change)
