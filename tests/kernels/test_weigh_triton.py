"""The kernel that weighs pages, against the reference, on Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from hip_kernels.layout import PAGE_SIZE, Choice, SparsePlan, Summaries
from hip_kernels.select import triton as module
from hip_kernels.select.choose import Shortlist
from hip_kernels.select.scores import Scores
from hip_kernels.select.weigh import page_logits
from hip_kernels.steps import DecodeSteps
from torch import Tensor

POOL, BATCH = 90, 3
HALF, FULL = torch.float16, torch.float32


@pytest.fixture
def kernels(interpreted: Callable[[ModuleType], ModuleType]) -> ModuleType:
    return interpreted(module)


def made(kv_heads: int, width: int, means: int, dtype: torch.dtype) -> Summaries:
    """Means with large constants, and deviations, as a model with outlier channels has them."""
    found = Summaries.empty(POOL, kv_heads, width, 8, means=means, dtype=dtype)
    found.mean.normal_()
    found.mean[..., 1] += 20
    found.sigma.uniform_(0, 3)
    return found


NOUGHT = torch.zeros(BATCH, dtype=torch.int64)
TABLE = torch.zeros(BATCH, 5, dtype=torch.int64)


def steps_of(token: Tensor, page: Tensor, table: Tensor) -> DecodeSteps:
    reuses = torch.zeros(len(page), dtype=torch.int32)
    return DecodeSteps(token, page * PAGE_SIZE + 5, page, table, torch.arange(len(page)), reuses)


def poisoned(heads: int, pages: int, means: int, kv_heads: int = 2) -> Scores:
    table = torch.zeros(BATCH, pages, dtype=torch.int64)
    out = Scores.of(steps_of(NOUGHT, NOUGHT, table), heads, kv_heads, means, SparsePlan())
    for tensor in (out.page, out.parts, out.spread, out.mass, out.total):
        tensor.fill_(float("nan"))
    return out


def weigh(kernels: ModuleType, query, summaries, steps, plan, scale, out) -> None:
    kv_heads = len(summaries.sigma)
    choice = Choice.empty(BATCH, kv_heads, query.shape[1] // kv_heads, plan, "cpu")
    scratch = Shortlist.of(out, kv_heads, plan)
    kernels.weigh(query, summaries, None, steps, choice, plan, scale, out, scratch)


@pytest.mark.parametrize("remainder", ["harmonic", "quadratic", "mean"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "means", "dtype", "cap"),
    [
        (8, 2, 128, 4, HALF, 0.0),
        (3, 3, 80, 4, FULL, 0.0),
        (24, 1, 64, 1, HALF, 0.0),
        (6, 2, 256, 4, FULL, 30.0),
    ],
)
def test_scores_equal_the_reference(
    kernels: ModuleType, heads, kv_heads, width, means, dtype, cap, remainder
) -> None:
    pages = 67
    plan = SparsePlan(remainder=remainder, logit_cap=cap)
    summaries = made(kv_heads, width, means, dtype)
    query = torch.randn(BATCH, heads, width).bfloat16()
    # both inside a tile and across tiles, and a request without a page
    visible = torch.tensor([67, 0, 5], dtype=torch.int64)
    table = torch.stack([torch.randperm(POOL)[:pages] for _ in range(BATCH)])
    # what lies beyond is no page of the pool
    table[2, 5:] = 1 << 30
    out = poisoned(heads, pages, means, kv_heads)
    # the flat batch has other rows, too
    steps = steps_of(torch.tensor([4, 1, 2]), visible, table)
    flat = torch.full((5, heads, width), float("nan")).bfloat16()
    flat[steps.token] = query
    weigh(kernels, flat, summaries, steps, plan, 0.1, out)
    bits = {"rtol": 1e-5, "atol": 1e-5} if dtype == FULL else {"rtol": 5e-3, "atol": 5e-3}
    for request, count in enumerate(visible.tolist()):
        near = summaries.take(table[request, :count].long())
        rows = 0.1 * query[request].float().view(kv_heads, -1, width)
        expected = page_logits(rows, near, plan)
        shown = (..., slice(None, count))
        mine = out.page[request].view(kv_heads, -1, pages)
        torch.testing.assert_close(mine[shown], expected.page, **bits)
        parts = out.parts[:, request].view(means, kv_heads, -1, pages)
        torch.testing.assert_close(parts[shown], expected.parts, **bits)
        if expected.spread is not None:
            spread = out.spread[request].view(kv_heads, -1, pages)
            torch.testing.assert_close(spread[shown], expected.spread, **bits)
        # what is not before a step is left alone
        assert out.page[request, :, count:].isnan().all()
        assert out.parts[:, request, :, count:].isnan().all()
        mass = out.page[request, :, :count].logsumexp(-1)
        torch.testing.assert_close(out.total[request], mass, rtol=1e-5, atol=1e-5)


def test_deviations_that_float16_cannot_square_do_not_overflow(kernels: ModuleType) -> None:
    summaries = made(1, 64, 4, HALF)
    summaries.sigma.fill_(1000.0)
    out = poisoned(1, 3, 4, 1)
    query, table = torch.randn(BATCH, 1, 64), torch.arange(9, dtype=torch.int64).view(3, 3)
    visible = torch.full((3,), 3, dtype=torch.int64)
    steps = steps_of(torch.arange(BATCH), visible, table)
    weigh(kernels, query, summaries, steps, SparsePlan(), 1.0, out)
    assert out.spread.isfinite().all()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("query", {"query": torch.empty(BATCH, 4, 32)}),
        ("query", {"query": torch.empty(BATCH, 3, 64)}),
        ("steps.table", {"steps": steps_of(NOUGHT, NOUGHT, torch.zeros(BATCH, 5).int())}),
        ("steps.page", {"steps": replace(steps_of(NOUGHT, NOUGHT, TABLE), page=NOUGHT[1:])}),
        ("scores.page", {"out": poisoned(6, 5, 4)}),
        ("scores.parts", {"out": poisoned(4, 5, 1)}),
        ("plan.remainder", {"plan": SparsePlan(remainder="log_cosh")}),
    ],
)
def test_a_wrong_argument_is_named(name: str, change: dict[str, object]) -> None:
    given = {
        "query": torch.empty(BATCH, 4, 64),
        "summaries": made(2, 64, 4, FULL),
        "steps": steps_of(NOUGHT, NOUGHT, TABLE),
        "plan": SparsePlan(),
        "scale": 1.0,
        "out": poisoned(4, 5, 4),
    }
    with pytest.raises(AssertionError, match=f"^{name} "):
        weigh(module, **(given | change))
