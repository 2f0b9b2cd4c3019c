"""Attention at the kernels' door, against plain loops and against torch's own attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hip_kernels.layout import Remainder, SparsePlan
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.brute import expected
from tests.kernels.door import Request, make_requests, run, step

LOOKS: list[dict[str, int]] = [{}, {"second_look": 1}, {"second_look": 2, "parts": 4}]
SMALL = SparsePlan(sink_pages=1, window_pages=2, budget_pages=2)


def queries(requests: list[Request], heads: int, width: int, seed: int = 1) -> torch.Tensor:
    rows = sum(request.length - request.prefix for request in requests)
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(rows, heads, width, generator=generator)


def dense(requests: list[Request], query: torch.Tensor) -> torch.Tensor:
    outputs, row = [], 0
    for request in requests:
        new = request.length - request.prefix
        q = query[row : row + new].transpose(0, 1)
        row += new
        mask = torch.ones(request.length, request.length).tril().bool()[-new:]
        group = query.shape[1] // request.key.shape[1]
        key = request.key.transpose(0, 1).repeat_interleave(group, 0)
        value = request.value.transpose(0, 1).repeat_interleave(group, 0)
        found = torch.nn.functional.scaled_dot_product_attention(q, key, value, attn_mask=mask)
        outputs.append(found.transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize(
    ("remainder", "means"),
    [
        ("harmonic", 4),
        ("harmonic", 1),
        ("log_cosh", 4),
        ("log_i0", 1),
        ("quadratic", 4),
        ("mean", 1),
        ("none", 4),
    ],
)
@pytest.mark.parametrize("looks", LOOKS, ids=str)
def test_a_mixed_batch_equals_plain_loops(
    remainder: Remainder, means: int, looks: dict[str, int]
) -> None:
    looks = looks | {"parts": min(means, looks.get("parts", 1))}
    plan = SparsePlan(1, 2, 2, remainder, **looks)
    # a decode step, a chunk that begins and ends inside pages, a short prompt, extends within a
    # page, and one that ends with it
    shapes = [(700, 1), (450, 70), (0, 9), (515, 10), (448, 1), (440, 8)]
    requests = make_requests(shapes, heads=2, width=24, value_width=40)
    query = queries(requests, 6, 24)
    limits = {"sparse_from": 256, "sparse_decode_from": 128, "means": means}
    found = run(requests, query, plan, **limits)
    reference = expected(requests, query, plan, **limits)
    torch.testing.assert_close(found.double(), reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("remainder", ["harmonic", "log_cosh", "log_i0", "quadratic", "none"])
@pytest.mark.parametrize("looks", LOOKS, ids=str)
def test_capped_logits_equal_plain_loops(remainder: Remainder, looks: dict[str, int]) -> None:
    plan = SparsePlan(1, 2, 2, remainder, **looks, logit_cap=3.0)
    requests = make_requests([(700, 1), (450, 70), (0, 9)], heads=2, width=23, value_width=40)
    query = 2 * queries(requests, 6, 23)
    limits = {"sparse_from": 256, "sparse_decode_from": 128}
    found = run(requests, query, plan, **limits)
    reference = expected(requests, query, plan, **limits)
    torch.testing.assert_close(found.double(), reference, rtol=1e-4, atol=1e-5)
    uncapped = run(requests, query, replace(plan, logit_cap=0.0), **limits)
    assert float((found - uncapped).abs().max()) > 0.1


@pytest.mark.parametrize("looks", LOOKS, ids=str)
@pytest.mark.parametrize("top_p", [0.0, 0.4, 0.6])
def test_top_p_equals_plain_loops(top_p: float, looks: dict[str, int]) -> None:
    plan = SparsePlan(1, 2, 5, "harmonic", **looks, top_p=top_p)
    requests = make_requests([(900, 1), (850, 70), (700, 1)], heads=2, width=24, value_width=40)
    query = queries(requests, 6, 24)
    limits = {"sparse_from": 256, "sparse_decode_from": 128}
    found = run(requests, query, plan, **limits)
    reference = expected(requests, query, plan, **limits)
    torch.testing.assert_close(found.double(), reference, rtol=1e-4, atol=1e-5)
    fewer = float((found - run(requests, query, replace(plan, top_p=1.0), **limits)).abs().max())
    assert fewer > 1e-3


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
@pytest.mark.parametrize("sparse", [True, False])
def test_stored_keys_and_values_are_dequantised(dtype: torch.dtype, sparse: bool) -> None:
    plan = SparsePlan(1, 2, 2, "harmonic", 1)
    requests = make_requests([(700, 1), (450, 70), (0, 9)], heads=2, width=24, value_width=40)
    query = queries(requests, 6, 24)
    start = 256 if sparse else None
    limits = {"sparse_from": start, "sparse_decode_from": start}
    scales = {"key_scale": 1.7, "value_scale": 0.3}
    stored = [replace(r, key=r.key.to(dtype), value=r.value.to(dtype)) for r in requests]
    real = [replace(r, key=1.7 * r.key.float(), value=0.3 * r.value.float()) for r in stored]
    found = run(stored, query, plan, **limits, **scales)
    torch.testing.assert_close(found, run(real, query, plan, **limits), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("remainder", ["none", "harmonic"])
@pytest.mark.parametrize("budget", [1, 3])
def test_the_published_search_equals_plain_loops(remainder: Remainder, budget: int) -> None:
    plan = SparsePlan(1, 2, budget, remainder, strategy="tree")
    # from fewer pages than the budget to four halvings
    shapes = [(1800, 1), (700, 1), (450, 70), (0, 9), (200, 1), (330, 150)]
    requests = make_requests(shapes, heads=2, width=24, value_width=40, seed=budget)
    query = queries(requests, 6, 24)
    limits = {"sparse_from": 0, "sparse_decode_from": 0}
    found = run(requests, query, plan, **limits)
    reference = expected(requests, query, plan, **limits)
    torch.testing.assert_close(found.double(), reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("means", [4, 1])
@pytest.mark.parametrize("looks", LOOKS, ids=str)
@pytest.mark.parametrize("beam", [1, 2])
def test_a_search_through_nodes_equals_plain_loops(
    means: int, looks: dict[str, int], beam: int
) -> None:
    looks = looks | {"parts": min(means, looks.get("parts", 1))}
    plan = SparsePlan(1, 3, 2, "harmonic", **looks, beam=beam)
    # decode steps with and without nodes, at a node's last page and first; the end of a prompt
    shapes = [(3500, 1), (2047, 1), (2048, 1), (900, 1), (1990, 40), (5700, 1)]
    requests = make_requests(shapes, heads=2, width=24, value_width=40)
    query = queries(requests, 6, 24)
    limits = {"sparse_from": 1920, "sparse_decode_from": 128, "nodes_from": 1500, "means": means}
    found = run(requests, query, plan, **limits)
    reference = expected(requests, query, plan, **limits)
    torch.testing.assert_close(found.double(), reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"beam": 1},
        {"beam": 2, "top_p": 0.6},
        {"beam": 1, "sink_pages": 9, "window_pages": 10, "remainder": "quadratic"},
        {"beam": 1, "logit_cap": 3.0, "remainder": "none", "budget_pages": 12},
    ],
    ids=str,
)
def test_prompts_that_search_through_nodes_equal_plain_loops(settings: dict[str, Any]) -> None:
    plan = SparsePlan(**({"sink_pages": 1, "window_pages": 3, "budget_pages": 2} | settings))
    # across the threshold, within a page, and from a node's last page into the next node
    shapes = [(1515, 40), (2900, 12), (2040, 30)]
    requests = make_requests(shapes, heads=2, width=24, value_width=40)
    query = queries(requests, 4, 24)
    limits = {"sparse_from": 256, "sparse_decode_from": 128}
    found = run(requests, query, plan, **limits, nodes_from=1536)
    reference = expected(requests, query, plan, **limits, nodes_from=1536)
    torch.testing.assert_close(found.double(), reference, rtol=1e-4, atol=1e-5)
    flat = run(requests, query, plan, **limits)
    torch.testing.assert_close(found[:21], flat[:21])
    assert float((found[21:] - flat[21:]).abs().max()) > 1e-3


def test_a_beam_of_all_nodes_weighs_every_page() -> None:
    plan = SparsePlan(1, 3, 2, "harmonic", 1, beam=99)
    requests = make_requests([(3500, 1), (2047, 1), (2000, 100)], heads=2, width=24, value_width=40)
    query = queries(requests, 6, 24)
    limits = {"sparse_from": 0, "sparse_decode_from": 0}
    with_nodes = run(requests, query, plan, **limits, nodes_from=0)
    torch.testing.assert_close(with_nodes, run(requests, query, plan, **limits))


@pytest.mark.parametrize("nodes_from", [None, 1500])
@pytest.mark.parametrize("second_look", [0, 1])
def test_a_choice_that_is_used_again_equals_plain_loops(
    nodes_from: int | None, second_look: int
) -> None:
    plan = SparsePlan(1, 3, 2, "harmonic", second_look, beam=2)
    # from one page into the next, into the next node, and into the last row of a page
    shapes = [(3500, 150), (2047, 1), (900, 100), (1990, 57)]
    later = make_requests(shapes, heads=2, width=24, value_width=40)
    later = [replace(r, prefix=r.length - 1) for r in later]
    earlier = [
        Request(r.key[: before + 1], r.value[: before + 1], prefix=before)
        for r, (before, _) in zip(later, shapes, strict=True)
    ]
    limits = {"sparse_from": None, "sparse_decode_from": 128, "nodes_from": nodes_from}
    _, choice = step(earlier, queries(earlier, 6, 24), plan, **limits)
    query = queries(later, 6, 24, seed=2)
    found, again = step(later, query, plan, **limits, held=choice, seed=3)
    assert torch.equal(again.entries, choice.entries)
    reference = expected(later, query, plan, **limits, held=choice)
    torch.testing.assert_close(found.double(), reference, rtol=1e-4, atol=1e-5)
    anew = run(later, query, plan, **limits)
    assert float((found - anew).abs().max()) > 1e-2


def test_a_beam_that_may_not_hold_a_choice_is_refused() -> None:
    plan = SparsePlan(1, 3, 2, "harmonic", beam=2)
    limits = {"sparse_from": None, "sparse_decode_from": 128, "nodes_from": 1500}
    requests = make_requests([(2900, 1)], heads=2, width=24, value_width=40)
    query = queries(requests, 6, 24)
    _, choice = step(requests, query, plan, **limits)
    with pytest.raises(AssertionError, match=r"plan\.beam of 1 nodes .* 2 chosen pages"):
        step(requests, query, replace(plan, beam=1), **limits, held=choice)


@settings(max_examples=15, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 700), st.integers(1, 300)), min_size=1, max_size=4),
    group=st.integers(1, 3),
    width=st.sampled_from([1, 7, 64, 80]),
    seed=st.integers(0, 1000),
)
def test_keep_all_and_a_budget_beyond_the_context_are_dense(
    shapes: list[tuple[int, int]], group: int, width: int, seed: int
) -> None:
    requests = make_requests(shapes, heads=2, width=width, value_width=width, seed=seed)
    query = queries(requests, 2 * group, width, seed)
    reference = dense(requests, query)
    keep_all = run(requests, query, SMALL, sparse_from=None, sparse_decode_from=None, seed=seed)
    torch.testing.assert_close(keep_all, reference, rtol=1e-4, atol=1e-5)
    for parts in (1, 4):
        ample = SparsePlan(1, 2, 99, second_look=3, parts=parts)
        sparse = run(requests, query, ample, sparse_from=0, sparse_decode_from=0, seed=seed)
        torch.testing.assert_close(sparse, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nodes_from", [None, 1536])
def test_chunks_of_whole_pages_do_not_change_what_is_computed(nodes_from: int | None) -> None:
    plan = replace(SMALL, beam=1)
    whole = make_requests([(0, 2900)], heads=2, width=32, value_width=32)
    query = queries(whole, 4, 32)
    limits = {"sparse_from": 192, "sparse_decode_from": 192, "nodes_from": nodes_from}
    at_once = run(whole, query, plan, **limits)
    key, value = whole[0].key, whole[0].value
    for start, end in ((0, 1600), (1600, 1664), (1664, 2900)):
        chunk = Request(key[:end], value[:end], prefix=start)
        found = run([chunk], query[start:end], plan, **limits, seed=start)
        torch.testing.assert_close(found, at_once[start:end], rtol=1e-4, atol=1e-5)


def test_a_request_does_not_depend_on_who_else_is_in_the_batch() -> None:
    shapes = [(640, 1), (333, 1), (1200, 1), (256, 130)]
    requests = make_requests(shapes, heads=1, width=16, value_width=16)
    query = queries(requests, 2, 16)
    limits = {"sparse_from": 64, "sparse_decode_from": 64}
    together = run(requests, query, SMALL, **limits)
    row = 0
    for request in requests:
        new = request.length - request.prefix
        alone = run([request], query[row : row + new], SMALL, **limits, seed=7)
        torch.testing.assert_close(alone, together[row : row + new], rtol=1e-4, atol=1e-5)
        row += new


def test_the_remainder_comes_nearer_to_dense_than_dropping() -> None:
    generator = torch.Generator().manual_seed(0)
    topic = torch.randn(8, 2, 64, generator=generator).repeat_interleave(512, 0)
    noise = torch.randn(2, 4096, 2, 64, generator=generator)
    request = Request(topic + 0.7 * noise[0], topic.roll(1, 1) + 0.5 * noise[1], prefix=4095)
    requests = [request]
    query = queries(requests, 4, 64)
    reference = dense(requests, query)

    def error(remainder: Remainder) -> float:
        plan = SparsePlan(1, 2, 2, remainder)
        found = run(requests, query, plan, sparse_from=0, sparse_decode_from=0)
        return float((found - reference).norm() / reference.norm())

    assert error("harmonic") < error("mean") < error("none")
    assert error("harmonic") < 0.25 * error("none")


def test_half_precision_keys_are_attended_in_float32() -> None:
    requests = make_requests([(500, 70)], heads=2, width=32, value_width=32)
    for request in requests:
        request.key = request.key.bfloat16().float()
        request.value = request.value.bfloat16().float()
    query = queries(requests, 4, 32).bfloat16()
    limits = {"sparse_from": 64, "sparse_decode_from": 64}
    found = run(requests, query, SMALL, **limits)
    reference = expected(requests, query.float(), SMALL, **limits)
    torch.testing.assert_close(found.double(), reference, rtol=1e-4, atol=1e-4)
