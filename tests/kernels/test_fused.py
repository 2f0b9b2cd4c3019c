"""Decode steps by kernels, at the kernels' door, against plain loops."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hip_kernels.attend import fused, reference
from hip_kernels.attend import triton as attending
from hip_kernels.layout import Selection, SparsePlan
from hip_kernels.select import choose
from hip_kernels.select import triton as weighing

from tests.kernels import door
from tests.kernels.brute import expected
from tests.kernels.test_attend import queries

LIMITS = {"sparse_from": 256, "sparse_decode_from": 128}


@pytest.fixture
def by_kernels(
    interpreted: Callable[[ModuleType], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """The door attends by kernels where it can; yields how many blocks it has so attended."""
    for module in (weighing, choose, attending):
        interpreted(module)
    served: list[int] = []

    def attend(
        query, kv, summaries, blocks, plan, scale, out, nodes=None, choice=None
    ) -> Selection | None:
        if fused.serves(blocks, plan):
            served.append(len(blocks))
            return fused.attend(query, kv, summaries, blocks, plan, scale, out, choice)
        return reference.attend(query, kv, summaries, blocks, plan, scale, out, nodes, choice)

    monkeypatch.setattr(door, "attend", attend)
    return served


def batch() -> tuple[list[door.Request], torch.Tensor]:
    """Decode steps within, at the end and at the start of a page, and a chunk with a tail."""
    shapes = [(900, 1), (850, 70), (703, 1), (704, 1), (40, 1)]
    requests = door.make_requests(shapes, heads=2, width=24, value_width=40)
    return requests, queries(requests, 6, 24)


@pytest.mark.parametrize(
    "settings",
    [
        {"second_look": 2, "top_p": 0.5},
        {"remainder": "quadratic"},
        {"remainder": "mean", "second_look": 1},
        {"remainder": "none"},
        {"logit_cap": 3.0, "second_look": 1},
        {"sink_pages": 0, "window_pages": 0},
    ],
    ids=str,
)
def test_decode_steps_equal_plain_loops(by_kernels: list[int], settings: dict[str, Any]) -> None:
    # a page has one mean, or four
    means = 1 if settings.get("remainder") == "quadratic" else 4
    plan = SparsePlan(**({"sink_pages": 1, "window_pages": 2, "budget_pages": 3} | settings))
    requests, query = batch()
    found = door.run(requests, query, plan, **LIMITS, means=means)
    plain = expected(requests, query, plan, **LIMITS, means=means)
    torch.testing.assert_close(found.double(), plain, rtol=1e-4, atol=1e-5)
    # the decode steps, one of them dense, and the chunk's last row
    assert sum(by_kernels) == 5


def test_a_held_choice_is_attended_to(by_kernels: list[int]) -> None:
    plan = SparsePlan(1, 2, 3, "harmonic", 1)
    requests, query = batch()
    requests, query = [requests[0], requests[2]], query[[0, 71]]
    _, fresh = door.step(requests, query, plan, **LIMITS)
    other = 1.1 * query
    found, again = door.step(requests, other, plan, **LIMITS, held=fresh)
    by_kernels.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(door, "attend", reference.attend)
        plain, _ = door.step(requests, other, plan, **LIMITS, held=fresh)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(again.pages, fresh.pages)


def test_what_has_no_kernel_is_left_to_the_reference(by_kernels: list[int]) -> None:
    requests, query = batch()
    for plan in (SparsePlan(1, 2, 3, "log_cosh"), SparsePlan(1, 2, 3, "none", strategy="tree")):
        door.run(requests, query, plan, **LIMITS)
    door.run(requests, query, SparsePlan(1, 2, 3), **LIMITS, nodes_from=512)
    # decode steps from 512 on search through nodes; the one before is not sparse, which has one
    assert by_kernels == [1, 1, 1]
