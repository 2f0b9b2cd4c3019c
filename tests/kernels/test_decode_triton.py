"""The decode kernel against one plain softmax over all keys, on Triton's interpreter."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from hip_kernels.attend import triton as module
from hip_kernels.layout import PAGE_SIZE, Choice, SparsePlan, Summaries
from hip_kernels.select.scores import Scores
from hip_kernels.steps import NO_PAGE, DecodeSteps
from hip_kernels.stored import PagedKV
from torch import Tensor

NEVER = float("-inf")
HALF, FULL = torch.float16, torch.float32


@pytest.fixture
def kernels(interpreted: Callable[[ModuleType], ModuleType]) -> ModuleType:
    return interpreted(module)


class Case:
    """Requests of odd lengths; every other page is chosen, and some weigh nothing."""

    plan = SparsePlan(sink_pages=1, window_pages=2)

    def __init__(
        self, heads: int, kv_heads: int, width: int, value_width: int, lengths: tuple[int, ...],
        kv_dtype: torch.dtype, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.group = heads // kv_heads
        most = -(-max(lengths) // PAGE_SIZE) + 2
        batch, pool = len(lengths), len(lengths) * most + 3
        slots = pool * PAGE_SIZE
        key = torch.randn(slots, kv_heads, width).to(kv_dtype)
        self.kv = PagedKV(key, torch.randn(slots, kv_heads, value_width).to(kv_dtype), 0.5, 2.0)
        self.summaries = Summaries.empty(pool, kv_heads, width, value_width, dtype=dtype)
        self.summaries.value.normal_()
        self.query = torch.randn(batch, heads, width).to(dtype)
        table = torch.randperm(pool)[: batch * most].view(batch, most)
        chosen = torch.full((batch, kv_heads, most), -1, dtype=torch.int64)
        logits = torch.randn(batch, heads, most)
        logits[:, :, 2] = NEVER
        position = torch.tensor(lengths, dtype=torch.int64) - 1
        own = position // PAGE_SIZE
        for request, page in enumerate(own.tolist()):
            # beyond a request nothing in the table is a page of the pool, and nothing is weighed
            table[request, page + 1 :] = 1 << 30
            logits[request, :, max(page - 2, 0) :] = float("nan")
            for head in range(kv_heads):
                kept = torch.tensor(range(1 + head % 2, page - 2, 2), dtype=torch.int64)
                # padding need not be last
                chosen[request, head, most - len(kept) :] = kept
        self.chosen: Choice | None = Choice(chosen, -torch.rand(batch, kv_heads, self.group))
        # the flat batch has other rows, too
        token = torch.arange(batch).flip(0) + 1
        reuses = torch.zeros(batch, dtype=torch.int32)
        self.steps = DecodeSteps(token, position, own, table, torch.arange(batch), reuses)
        self.scores: Scores | None = Scores.of(self.steps, heads, kv_heads, 4, self.plan)
        self.scores.page.copy_(logits)

    def run(self, kernels: ModuleType, cap: float = 0.0) -> tuple[Tensor, Tensor]:
        batch, heads, width = self.query.shape
        query = torch.full((batch + 2, heads, width), float("nan")).to(self.query.dtype)
        query[self.steps.token] = self.query
        out = torch.full((batch + 2, heads, self.kv.value.shape[2]), float("nan")).to(query.dtype)
        estimated = torch.full((batch, heads), float("nan"))
        plan = replace(self.plan, logit_cap=cap)
        steps = self.steps if self.chosen else replace(self.steps, sparse_from=NO_PAGE)
        given = query, self.kv, self.summaries, None, steps, self.chosen, self.scores
        kernels.decode(*given, plan, 0.1, out, estimated)
        assert out.isnan().all(-1).sum() == 2 * heads
        return out[self.steps.token], estimated

    def expected(self, cap: float = 0.0) -> tuple[Tensor, Tensor]:
        outs, shares = [], []
        for request, length in enumerate((self.steps.position + 1).tolist()):
            for head in range(self.query.shape[1]):
                out, share = self.row(request, head, length, cap)
                outs.append(out)
                shares.append(share)
        shape = self.query.shape[:2]
        return torch.stack(outs).view(*shape, -1), torch.stack(shares).view(shape)

    def row(self, request: int, head: int, length: int, cap: float) -> tuple[Tensor, Tensor]:
        group, own = head // self.group, int(self.steps.page[request])
        between = set(range(self.plan.sink_pages, own - self.plan.window_pages))
        pruned: set[int] = set()
        if self.chosen is not None:
            pruned = between - set(self.chosen.entries[request, group].tolist())
        logits, values = [], []
        for page in sorted(set(range(own + 1)) - pruned):
            count = min(PAGE_SIZE, length - page * PAGE_SIZE)
            start = int(self.steps.table[request, page]) * PAGE_SIZE
            key = self.kv.key[start : start + count, group].double() * self.kv.key_scale
            logit = key @ self.query[request, head].double() * 0.1
            logits.append(cap * (logit / cap).tanh() if cap else logit)
            value = self.kv.value[start : start + count, group]
            values.append(value.double() * self.kv.value_scale)
        exact = sum(map(len, logits))
        for page in sorted(pruned) if self.scores else []:
            assert self.chosen is not None
            assert self.scores is not None
            logit = self.scores.page[request, head, page]
            logit = logit + self.chosen.correction[request].flatten()[head]
            logits.append(logit.double()[None])
            place = int(self.steps.table[request, page])
            values.append(self.summaries.value[group, place][None].double())
        weight = torch.cat(logits).softmax(0)
        return weight @ torch.cat(values), weight[exact:].sum()


SHAPES = [
    (8, 2, 128, 128, (1, 63, 64, 1000), HALF, HALF),
    (3, 3, 80, 80, (65, 700), FULL, FULL),
    (8, 1, 64, 96, (257,), torch.float8_e4m3fn, HALF),
    (2, 2, 256, 256, (130, 1), FULL, FULL),
]


@pytest.mark.parametrize(("shape", "cap"), [*((s, 0.0) for s in SHAPES), (SHAPES[1], 5.0)])
def test_decode_equals_one_softmax_over_everything(kernels: ModuleType, shape, cap) -> None:
    case = Case(*shape)
    found, estimated = case.run(kernels, cap)
    expected, share = case.expected(cap)
    bits = 3e-3 if shape[-1] == HALF else 1e-5
    torch.testing.assert_close(found.double(), expected, rtol=bits, atol=bits)
    torch.testing.assert_close(estimated.double(), share, rtol=bits, atol=bits)


@pytest.mark.parametrize("change", [{"chosen": None}, {}], ids=["all is exact", "none estimated"])
def test_what_is_pruned_need_not_be_estimated(kernels: ModuleType, change: dict[str, None]) -> None:
    case = Case(4, 2, 32, 32, (900, 70), FULL, FULL)
    vars(case).update({"scores": None} | change)
    found, estimated = case.run(kernels)
    torch.testing.assert_close(found.double(), case.expected()[0], rtol=1e-5, atol=1e-5)
    assert not estimated.any()


def test_many_pages_are_split_over_programs(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(4, 2, 32, 32, (900, 70), FULL, FULL)
    whole, _ = case.run(kernels)
    for name, size in (("EXACT_A_SPLIT", 1), ("TILES_A_SPLIT", 1), ("PAGES_A_TILE", 16)):
        monkeypatch.setattr(kernels, name, size)
    split, _ = case.run(kernels)
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-6)
    assert torch.equal(split, case.run(kernels)[0])


def test_logits_far_apart_do_not_overflow(kernels: ModuleType) -> None:
    case = Case(2, 1, 32, 32, (500,), FULL, FULL)
    assert case.scores is not None
    case.scores.page.fill_(3000.0)
    found, estimated = case.run(kernels)
    torch.testing.assert_close(found.double(), case.expected()[0], rtol=1e-5, atol=1e-5)
    assert (estimated == 1).all()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("query", {"query": torch.empty(2, 4, 80)}),
        ("kv.value", {"kv": PagedKV(torch.empty(640, 3, 80), torch.empty(64, 3, 80))}),
        ("scores.page", {"scores": Case(*SHAPES[0]).scores}),
        ("out", {"out": torch.empty(2, 3, 64)}),
        ("estimated", {"estimated": torch.empty(2, 3, dtype=HALF)}),
    ],
)
def test_a_wrong_argument_is_named(name: str, change: dict[str, object]) -> None:
    with pytest.raises(AssertionError, match=f"^{re.escape(name)} "):
        module.decode(**(arguments(Case(*SHAPES[1])) | change))


@pytest.mark.parametrize("name", ["token", "position", "page", "table", "row", "reuses"])
def test_a_wrong_tensor_of_the_steps_is_named(name: str) -> None:
    case = Case(*SHAPES[1])
    steps = replace(case.steps, **{name: getattr(case.steps, name).double()})
    with pytest.raises(AssertionError, match=rf"^steps\.{name} "):
        module.decode(**(arguments(case) | {"steps": steps}))


@pytest.mark.parametrize("name", ["entries", "correction"])
def test_a_wrong_tensor_of_the_choice_is_named(name: str) -> None:
    case = Case(*SHAPES[1])
    assert case.chosen is not None
    chosen = replace(case.chosen, **{name: getattr(case.chosen, name).double()})
    with pytest.raises(AssertionError, match=rf"^choice\.{name} "):
        module.decode(**(arguments(case) | {"choice": chosen}))


def arguments(case: Case) -> dict[str, object]:
    return {
        "query": case.query,
        "kv": case.kv,
        "summaries": case.summaries,
        "nodes": None,
        "steps": case.steps,
        "choice": case.chosen,
        "scores": case.scores,
        "plan": case.plan,
        "scale": 1.0,
        "out": torch.empty(2, 3, 80),
        "estimated": torch.empty(2, 3),
    }
