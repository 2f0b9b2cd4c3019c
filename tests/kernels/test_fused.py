"""Attention by kernels, at the kernels' door, against plain loops."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hip_kernels.attend import fused, reference
from hip_kernels.layout import Selection, SparsePlan

from tests.kernels import door
from tests.kernels.brute import expected
from tests.kernels.test_attend import queries

LIMITS = {"sparse_from": 256, "sparse_decode_from": 128}


@pytest.fixture
def left_over(
    interpreted: Callable[[ModuleType], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """The door attends by kernels where it can; yields the rows of the blocks that it cannot."""
    interpreted(fused)
    left: list[int] = []

    def attend(
        query, kv, summaries, blocks, plan, scale, out, nodes=None, choice=None
    ) -> Selection | None:
        given = query, kv, summaries, blocks, plan, scale, out, nodes, choice
        if fused.serves(blocks, plan, query.shape[2]):
            return fused.attend(*given)
        left.append(blocks.tokens.shape[1])
        return reference.attend(*given)

    monkeypatch.setattr(door, "attend", attend)
    return left


def batch() -> tuple[list[door.Request], torch.Tensor]:
    """Decode steps within, at the end and at the start of a page, and chunks with tails."""
    shapes = [(900, 1), (850, 70), (703, 1), (704, 1), (40, 1), (200, 130)]
    requests = door.make_requests(shapes, heads=2, width=24, value_width=40)
    return requests, queries(requests, 6, 24)


@pytest.mark.parametrize(
    "settings",
    [
        {"second_look": 2, "top_p": 0.5, "parts": 4},
        {"remainder": "quadratic"},
        {"remainder": "mean", "second_look": 1, "parts": 4},
        {"remainder": "none"},
        {"logit_cap": 3.0, "second_look": 1},
        {"sink_pages": 0, "window_pages": 0},
    ],
    ids=str,
)
def test_a_batch_equals_plain_loops(left_over: list[int], settings: dict[str, Any]) -> None:
    # a page has one mean, or four
    means = 1 if settings.get("remainder") == "quadratic" else 4
    plan = SparsePlan(**({"sink_pages": 1, "window_pages": 2, "budget_pages": 3} | settings))
    requests, query = batch()
    found = door.run(requests, query, plan, **LIMITS, means=means)
    plain = expected(requests, query, plan, **LIMITS, means=means)
    torch.testing.assert_close(found.double(), plain, rtol=1e-4, atol=1e-5)
    assert not left_over


def test_a_held_choice_is_attended_to(left_over: list[int]) -> None:
    plan = SparsePlan(1, 2, 3, "harmonic", 1)
    requests, query = batch()
    requests, query = [requests[0], requests[2]], query[[0, 71]]
    _, fresh = door.step(requests, query, plan, **LIMITS)
    other = 1.1 * query
    found, again = door.step(requests, other, plan, **LIMITS, held=fresh)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(door, "attend", reference.attend)
        plain, _ = door.step(requests, other, plan, **LIMITS, held=fresh)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(again.entries, fresh.entries)


@pytest.mark.parametrize(
    "settings",
    [
        {"second_look": 1, "parts": 4},
        {"sink_pages": 9, "window_pages": 10, "top_p": 0.6},
        {"remainder": "none"},
    ],
    ids=str,
)
def test_steps_that_search_through_nodes_equal_plain_loops(
    left_over: list[int], settings: dict[str, Any]
) -> None:
    plan = SparsePlan(
        **({"sink_pages": 1, "window_pages": 3, "budget_pages": 2} | settings), beam=2
    )
    # within a node, at its end, past it, and one that is not long enough
    shapes = [(2900, 1), (2047, 1), (2048, 1), (900, 1), (1550, 40)]
    requests = door.make_requests(shapes, heads=2, width=24, value_width=40)
    query = queries(requests, 6, 24)
    limits = {"sparse_from": 1500, "sparse_decode_from": 128, "nodes_from": 1500}
    found = door.run(requests, query, plan, **limits)
    plain = expected(requests, query, plan, **limits)
    torch.testing.assert_close(found.double(), plain, rtol=1e-4, atol=1e-5)
    assert not left_over


@pytest.mark.parametrize(
    ("heads", "settings"),
    [
        ((2, 2), {}),
        ((1, 3), {"top_p": 0.6, "logit_cap": 3.0}),
        ((1, 1), {"beam": 1, "sink_pages": 9, "window_pages": 10, "remainder": "quadratic"}),
        ((2, 2), {"beam": 1, "remainder": "none", "budget_pages": 12}),
    ],
    ids=str,
)
def test_prompts_that_search_through_nodes_equal_plain_loops(
    left_over: list[int], heads: tuple[int, int], settings: dict[str, Any]
) -> None:
    plan = SparsePlan(
        **({"sink_pages": 1, "window_pages": 3, "budget_pages": 2, "beam": 2} | settings)
    )
    # across the threshold, and to where the window leaves another node
    shapes = [(1530, 70), (2747, 69)]
    means = 1 if settings.get("remainder") == "quadratic" else 4
    requests = door.make_requests(shapes, heads=heads[0], width=24, value_width=40)
    query = queries(requests, heads[1], 24)
    limits = {"sparse_from": 256, "sparse_decode_from": 128, "nodes_from": 1536, "means": means}
    found = door.run(requests, query, plan, **limits)
    plain = expected(requests, query, plan, **limits)
    torch.testing.assert_close(found.double(), plain, rtol=1e-4, atol=1e-5)
    assert not left_over


def test_a_held_choice_is_attended_to_however_light_its_nodes_are(left_over: list[int]) -> None:
    plan = SparsePlan(1, 3, 2, "harmonic", 1, beam=2)
    limits = {"sparse_from": None, "sparse_decode_from": 128, "nodes_from": 1500}
    requests = door.make_requests([(2900, 1), (2047, 1)], heads=2, width=24, value_width=40)
    _, choice = door.step(requests, queries(requests, 6, 24), plan, **limits)
    query = queries(requests, 6, 24, seed=2)
    found, again = door.step(requests, query, plan, **limits, held=choice)
    assert torch.equal(again.entries, choice.entries)
    plain = expected(requests, query, plan, **limits, held=choice)
    torch.testing.assert_close(found.double(), plain, rtol=1e-4, atol=1e-5)
    anew = door.run(requests, query, plan, **limits)
    assert float((found - anew).abs().max()) > 1e-2


def test_what_has_no_kernel_is_left_to_the_reference(left_over: list[int]) -> None:
    requests, query = batch()
    for plan in (SparsePlan(1, 2, 3, "log_cosh"), SparsePlan(1, 2, 3, "none", strategy="tree")):
        door.run(requests, query, plan, **LIMITS)
    # a decode step and a block that keep every page have one
    assert sorted(left_over) == [1] * 4 + [64] * 4
