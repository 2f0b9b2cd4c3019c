"""Which pages are kept: sink, window, own and the best; disjoint, and never of the future."""

from __future__ import annotations

import torch
from hip_kernels.layout import SparsePlan
from hip_kernels.select.reference import best
from hip_kernels.select.weigh import NEVER, Context, PageLogits, mark, spread
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=200, deadline=None)
@given(
    pages=st.integers(1, 60),
    blocks=st.integers(1, 5),
    sink=st.integers(0, 3),
    window=st.integers(0, 5),
    budget=st.integers(1, 12),
    seed=st.integers(0, 10_000),
)
def test_every_visible_page_is_exact_once_or_pruned(
    pages: int, blocks: int, sink: int, window: int, budget: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    page = torch.randint(0, pages, (blocks,), generator=generator)
    score = torch.randn(blocks, 2, pages, generator=generator)
    # ties, and candidates without any estimated mass
    score[:, 0] = score[:, 0].round()
    score[torch.rand(score.shape, generator=generator) < 0.1] = NEVER
    plan = SparsePlan(sink, window, budget)
    # pages lie in any order in the pool; some columns are nothing that the block can see
    column = torch.stack([torch.randperm(pages + 2, generator=generator) for _ in range(blocks)])
    logical = column.where(column < page[:, None], -1)
    weight = torch.zeros(2, blocks, 1, pages + 2)
    context = Context(logical[None], PageLogits(weight, [weight], None), weight.transpose(2, 3))
    by_column = (
        torch.nn.functional.pad(score, (0, 2)).transpose(0, 1).gather(2, column.expand(2, -1, -1))
    )
    columns = best(by_column, context.candidates(page, plan), budget)
    [(left_over, _)] = context.remainder(columns, page, plan)
    budgeted = context.entries(columns, 1)
    assert torch.equal(columns.sort(-1).values, context.columns(budgeted, pages).sort(-1).values)
    selected = plan.with_fixed_pages(budgeted.transpose(0, 1), page)
    for n in range(blocks):
        own = int(page[n])
        for head in range(2):
            kept = [p for p in selected[n, head].tolist() if p >= 0]
            assert kept == sorted(set(kept)), "in page order, each once"
            assert kept[-1] == own
            assert all(p < own for p in kept[:-1]), "wholly before the query"
            must = set(range(min(sink, own))) | set(range(max(0, own - window), own + 1))
            assert must <= set(kept)
            chosen = set(kept) - must
            assert chosen == {p for p in budgeted[head, n].tolist() if p >= 0}
            candidates = set(range(own)) - must
            assert len(chosen) == min(budget, len(candidates))
            left = candidates - chosen
            pruned = logical[n, left_over[head, n, 0] > NEVER].tolist()
            assert sorted(pruned) == sorted(left), "what is not exact is estimated, once"
            if left and chosen:
                worst = min(float(score[n, head, p]) for p in chosen)
                assert worst >= max(float(score[n, head, p]) for p in left)


def test_mark_ignores_what_is_not_valid() -> None:
    index = torch.tensor([[0, 2, 2], [1, 0, 3]])
    valid = torch.tensor([[True, True, False], [True, False, False]])
    assert mark(index, valid, 4).tolist() == [
        [True, False, True, False],
        [False, True, False, False],
    ]


def test_the_guard_is_zero_without_spread_and_never_above_the_quadratic() -> None:
    query = torch.randn(2, 5, 33)
    assert torch.equal(spread(query, torch.zeros(2, 7, 33), "harmonic"), torch.zeros(2, 5, 7))
    sigma = torch.rand(2, 7, 33) * 3
    quadratic = spread(query, sigma, "quadratic")
    for kind in ("harmonic", "log_cosh"):
        guard = spread(query, sigma, kind)  # type: ignore[arg-type]
        assert bool((guard <= quadratic + 1e-4).all())
        # the second order is the same: where the spread is small, so is the difference
        small = spread(query, sigma * 1e-3, kind)  # type: ignore[arg-type]
        torch.testing.assert_close(
            small, spread(query, sigma * 1e-3, "quadratic"), rtol=3e-2, atol=0
        )
