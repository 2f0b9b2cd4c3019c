"""The kernels that summarise, against the reference, on Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from hip_kernels.layout import NODE_PAGES, PAGE_SIZE, Summaries
from hip_kernels.stored import PagedKV
from hip_kernels.summarize import reference
from hip_kernels.summarize import triton as module
from torch import Tensor

PAGES = 11
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture
def kernels(interpreted: Callable[[ModuleType], ModuleType]) -> ModuleType:
    return interpreted(module)


def poisoned(pages: int, heads: int, width: int, value_width: int, means: int, dtype) -> Summaries:
    found = Summaries.empty(pages, heads, width, value_width, means=means, dtype=dtype)
    for tensor in found.tensors:
        tensor.fill_(float("nan"))
    return found


def pool_of(heads: int, width: int, value_width: int, dtype: torch.dtype) -> PagedKV:
    slots = PAGES * PAGE_SIZE
    # a constant in one channel, which a one-pass variance would drown in
    key = torch.randn(slots, heads, width)
    key[..., 3] += 300.0
    value = torch.randn(slots, heads, value_width)
    return PagedKV(key.to(dtype), value.to(dtype))


def assert_same(found: Summaries, expected: Summaries) -> None:
    """To the last bit or two of what is stored, and nothing written beside it."""
    bits = 2e-3 if expected.mean.dtype == HALF else 1e-5
    for ours, theirs in zip(found.tensors, expected.tensors, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=bits, atol=bits / 10, equal_nan=True)


@pytest.mark.parametrize("means", [1, 4])
@pytest.mark.parametrize(
    ("heads", "width", "value_width", "stored", "kept"),
    [
        (1, 64, 64, FULL, FULL),
        (3, 80, 80, HALF, HALF),
        (2, 128, 96, BRAIN, HALF),
        (2, 20, 12, FULL, FULL),
        (1, 256, 256, torch.float8_e4m3fn, HALF),
        (1, 128, 128, torch.float8_e5m2, HALF),
    ],
)
def test_pages_and_nodes_equal_the_reference(
    kernels: ModuleType, heads, width, value_width, stored, kept, means: int
) -> None:
    kv = replace(pool_of(heads, width, value_width, stored), key_scale=0.5, value_scale=2.0)
    found, expected = (poisoned(PAGES, heads, width, value_width, means, kept) for _ in range(2))
    pages = torch.randperm(PAGES)[:9]
    # -1 is no page
    kernels.summarize(kv, torch.cat([pages[:4], torch.tensor([-1]), pages[4:]]), found)
    reference.summarize(kv, pages, expected)
    assert_same(found, expected)
    assert found.mean.isnan().any()

    nodes, places = (poisoned(3, heads, width, value_width, 1, kept) for _ in range(2))
    of = pages[torch.randint(9, (2, NODE_PAGES))]
    kernels.pool(expected, of, torch.tensor([2, 0]), nodes)
    reference.pool(expected, of, torch.tensor([2, 0]), places)
    assert_same(nodes, places)
    assert nodes.value[:, 1].isnan().all()


def test_what_half_precision_cannot_hold_is_its_largest(kernels: ModuleType) -> None:
    huge = torch.full((PAGE_SIZE, 1, 16), 1e6)
    huge[::2] = -1e6
    out = poisoned(1, 1, 16, 16, 1, HALF)
    kernels.summarize(PagedKV(huge, huge.abs()), torch.tensor([0]), out)
    largest = torch.finfo(HALF).max
    assert (out.mean == 0).all()
    assert (out.sigma == largest).all()
    assert (out.value == largest).all()


def test_the_same_inputs_give_the_same_bits(kernels: ModuleType) -> None:
    kv, pages = pool_of(2, 64, 64, BRAIN), torch.arange(PAGES)
    found = [poisoned(PAGES, 2, 64, 64, 4, HALF) for _ in range(2)]
    for out in found:
        kernels.summarize(kv, pages, out)
    assert all(map(torch.equal, found[0].tensors, found[1].tensors))


def test_nothing_to_do_is_nothing_done(kernels: ModuleType) -> None:
    out = poisoned(PAGES, 2, 64, 64, 4, HALF)
    none = torch.empty(0, dtype=torch.int64)
    kernels.summarize(pool_of(2, 64, 64, BRAIN), none, out)
    nodes = poisoned(PAGES, 2, 64, 64, 1, HALF)
    kernels.pool(out, none.view(0, NODE_PAGES), none, nodes)
    assert out.mean.isnan().all()
    assert nodes.mean.isnan().all()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("kv.key", lambda kv, pages, out: (replace(kv, key=kv.key[:, :, :32]), pages, out)),
        ("kv.value", lambda kv, pages, out: (replace(kv, value=kv.value[:64]), pages, out)),
        ("pages", lambda kv, pages, out: (kv, pages.int(), out)),
        ("out.sigma", lambda kv, pages, out: (kv, pages, replace(out, sigma=out.sigma.float()))),
        ("out.value", lambda kv, pages, out: (kv, pages, replace(out, value=out.value[:, :3]))),
    ],
)
def test_a_wrong_argument_is_named(
    name: str, change: Callable[[PagedKV, Tensor, Summaries], tuple[PagedKV, Tensor, Summaries]]
) -> None:
    given = pool_of(2, 64, 64, BRAIN), torch.arange(3), poisoned(PAGES, 2, 64, 64, 4, HALF)
    with pytest.raises(AssertionError, match=f"^{name} "):
        module.summarize(*change(*given))
