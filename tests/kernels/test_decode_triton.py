"""The decode kernel against one plain softmax over all keys, on Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from hip_kernels.attend import triton as module
from hip_kernels.layout import PAGE_SIZE, PagedKV, Summaries
from torch import Tensor

NEVER = float("-inf")
HALF, FULL = torch.float16, torch.float32


@pytest.fixture
def kernels(interpreted: Callable[[ModuleType], ModuleType]) -> ModuleType:
    return interpreted(module)


class Case:
    """Requests of odd lengths; every other page is exact, and some are neither."""

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
        exact = torch.full((batch, kv_heads, most), -1, dtype=torch.int64)
        rest = torch.randn(batch, heads, most)
        for request, length in enumerate(lengths):
            pages = -(-length // PAGE_SIZE)
            rest[request, :, pages - 1 :] = NEVER
            for head in range(kv_heads):
                kept = torch.arange(head % 2, pages, 2)
                kept = torch.cat([kept, torch.tensor([pages - 1])]).unique()
                # padding need not be last
                exact[request, head, most - len(kept) :] = kept
                rest[request, head * self.group : (head + 1) * self.group, kept] = NEVER
        rest[:, :, 2] = NEVER
        # beyond a request nothing in the table is a page of the pool
        for request, length in enumerate(lengths):
            table[request, -(-length // PAGE_SIZE) :] = 1 << 30
        of_lengths = torch.tensor(lengths, dtype=torch.int64)
        self.step = module.DecodeStep(table, of_lengths, exact, rest)

    def run(self, kernels: ModuleType, cap: float = 0.0) -> tuple[Tensor, Tensor]:
        batch, heads, _ = self.query.shape
        out = torch.full((batch, heads, self.kv.value.shape[2]), float("nan"))
        out = out.to(self.query.dtype)
        estimated = torch.full((batch, heads), float("nan"))
        given = self.query, self.kv, self.summaries, self.step
        kernels.decode(*given, 0.1, cap, out, estimated)
        return out, estimated

    def expected(self, cap: float = 0.0) -> tuple[Tensor, Tensor]:
        outs, shares = [], []
        for request, length in enumerate(self.step.lengths.tolist()):
            for head in range(self.query.shape[1]):
                out, share = self.row(request, head, length, cap)
                outs.append(out)
                shares.append(share)
        shape = self.query.shape[:2]
        return torch.stack(outs).view(*shape, -1), torch.stack(shares).view(shape)

    def row(self, request: int, head: int, length: int, cap: float) -> tuple[Tensor, Tensor]:
        group = head // self.group
        logits, values = [], []
        for page in self.step.exact[request, group].tolist():
            if page >= 0:
                count = min(PAGE_SIZE, length - page * PAGE_SIZE)
                start = int(self.step.table[request, page]) * PAGE_SIZE
                key = self.kv.key[start : start + count, group].double() * self.kv.key_scale
                logit = key @ self.query[request, head].double() * 0.1
                logits.append(cap * (logit / cap).tanh() if cap else logit)
                value = self.kv.value[start : start + count, group]
                values.append(value.double() * self.kv.value_scale)
        exact = sum(map(len, logits))
        for page, logit in enumerate(self.step.rest[request, head].double()):
            if logit > NEVER:
                logits.append(logit[None])
                place = int(self.step.table[request, page])
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
    case.step.rest[case.step.rest > NEVER] = 3000.0
    found, estimated = case.run(kernels)
    torch.testing.assert_close(found.double(), case.expected()[0], rtol=1e-5, atol=1e-5)
    assert (estimated == 1).all()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("query", {"query": torch.empty(2, 4, 80)}),
        ("kv.value", {"kv": PagedKV(torch.empty(640, 3, 80), torch.empty(64, 3, 80))}),
        ("out", {"out": torch.empty(2, 3, 64)}),
        ("estimated", {"estimated": torch.empty(2, 3, dtype=HALF)}),
    ],
)
def test_a_wrong_argument_is_named(name: str, change: dict[str, object]) -> None:
    case = Case(*SHAPES[1])
    given = {
        "query": case.query,
        "kv": case.kv,
        "summaries": case.summaries,
        "step": case.step,
        "scale": 1.0,
        "cap": 0.0,
        "out": torch.empty(2, 3, 80),
        "estimated": torch.empty(2, 3),
    }
    with pytest.raises(AssertionError, match=f"^{name} "):
        module.decode(**(given | change))


@pytest.mark.parametrize("name", ["table", "lengths", "exact", "rest"])
def test_a_wrong_tensor_of_the_step_is_named(name: str) -> None:
    case = Case(*SHAPES[1])
    wrong = replace(case.step, **{name: getattr(case.step, name).double()})
    out, estimated = torch.empty(2, 3, 80), torch.empty(2, 3)
    with pytest.raises(AssertionError, match=rf"^step\.{name} "):
        module.decode(case.query, case.kv, case.summaries, wrong, 1.0, 0.0, out, estimated)
