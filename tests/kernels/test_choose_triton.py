"""The kernels that choose pages, against sorting, on Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from hip_kernels.layout import PAGE_SIZE, DecodeSteps, PagedKV, SparsePlan
from hip_kernels.select import best
from hip_kernels.select import choose as module
from hip_kernels.select.triton import Scores
from torch import Tensor

NEVER = float("-inf")
BATCH, KV_HEADS, MEANS, WIDTH = 3, 2, 4, 32
PAGES = 71
VISIBLE = (71, 3, 40)


@pytest.fixture
def kernels(
    interpreted: Callable[[ModuleType], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> ModuleType:
    # several tiles, the last of them not full
    monkeypatch.setattr(module, "KEYS_A_TILE", 16)
    return interpreted(module)


class Case:
    """Weights of few values, so that many are equal, and of none; what is not seen is poison."""

    def __init__(self, group: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        heads = KV_HEADS * group
        nan = float("nan")
        page = torch.randint(-3, 4, (BATCH, heads, PAGES)).float()
        page[torch.rand(page.shape) < 0.2] = NEVER
        for request, visible in enumerate(VISIBLE):
            page[request, :, visible:] = nan
        visible = torch.tensor(VISIBLE)
        self.table = torch.stack([torch.randperm(PAGES) for _ in range(BATCH)])
        # the flat batch has other rows, too
        token = torch.tensor([3, 0, 4])
        self.steps = DecodeSteps(token, visible * PAGE_SIZE + 5, visible, self.table)
        self.scores = Scores.of(self.steps, heads, MEANS)
        self.scores.page.copy_(page)
        self.scores.parts.copy_(torch.randn(self.scores.parts.shape) + page - 4.2)
        self.scores.spread.copy_(torch.rand(page.shape) + 0 * page.nan_to_num(neginf=0))
        self.scores.mass.fill_(NEVER)
        seen = page.nan_to_num(nan=NEVER)
        # all of it in one tile's
        self.scores.mass[..., 1] = seen.logsumexp(-1)
        rows = torch.randn(PAGES * PAGE_SIZE, KV_HEADS, WIDTH)
        self.kv = PagedKV(rows, rows, key_scale=0.5)
        self.flat = torch.full((5, heads, WIDTH), nan)
        self.query = torch.randn(BATCH, heads, WIDTH)
        self.flat[token] = self.query

    def choose(self, kernels: ModuleType, plan: SparsePlan) -> module.Chosen:
        given = self.flat, self.kv, self.scores, self.steps, plan, 0.2
        found: module.Chosen = kernels.choose(*given)
        return found

    def shares(self) -> Tensor:
        """[B, Hkv, G, P]"""
        page = self.scores.page.nan_to_num(nan=NEVER)
        share = page - page.logsumexp(-1, keepdim=True)
        return share.view(BATCH, KV_HEADS, -1, PAGES)


def first_of_best(score: Tensor, visible: int, plan: SparsePlan) -> list[int]:
    """Best first; of equal ones the first."""
    between = range(plan.sink_pages, visible - plan.window_pages)
    return sorted(between, key=lambda page: (-float(score[page]), page))[: plan.budget_pages]


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("budget", [1, 17, 200])
def test_the_first_of_the_best_are_chosen_in_order(
    kernels: ModuleType, group: int, budget: int
) -> None:
    plan = SparsePlan(sink_pages=1, window_pages=2, budget_pages=budget)
    case = Case(group)
    found = case.choose(kernels, plan)
    share = case.shares().amax(2)
    for request, visible in enumerate(VISIBLE):
        for head in range(KV_HEADS):
            expected = sorted(first_of_best(share[request, head], visible, plan))
            padding = [-1] * (budget - len(expected))
            assert found.pages[request, head].tolist() == expected + padding
    assert not found.correction.any()


def test_a_share_of_the_mass_bounds_what_is_chosen(kernels: ModuleType) -> None:
    plan = SparsePlan(sink_pages=2, window_pages=1, budget_pages=70, top_p=0.7)
    case = Case(3)
    found = case.choose(kernels, plan)
    counts = []
    for request, visible in enumerate(VISIBLE):
        for head in range(KV_HEADS):
            share = case.shares()[request, head]
            order = first_of_best(share.amax(0), visible, plan)
            fixed = [page for page in range(visible) if page not in set(order)]
            held = share[:, fixed].exp().sum(1)
            kept = []
            for page in order:
                if bool((held < plan.top_p).any()):
                    kept.append(page)
                held += share[:, page].exp()
            chosen = [page for page in found.pages[request, head].tolist() if page >= 0]
            assert chosen == sorted(kept)
            counts.append((len(kept), len(order)))
    assert any(0 < kept < given for kept, given in counts)


@pytest.mark.parametrize("remainder", ["harmonic", "mean"])
def test_a_second_look_reads_the_most_promising_sub_pages(
    kernels: ModuleType, remainder: str
) -> None:
    plan = SparsePlan(1, 2, 5, remainder, second_look=2)
    case = Case(3)
    found = case.choose(kernels, plan)
    tokens = PAGE_SIZE // MEANS
    spread = case.scores.spread if remainder == "harmonic" else torch.zeros(())
    mass = case.scores.page.nan_to_num(nan=NEVER).logsumexp(-1, keepdim=True)
    promise = (case.scores.parts + spread - mass).view(MEANS, BATCH, KV_HEADS, 3, PAGES)
    estimate = case.scores.parts + spread + torch.tensor(float(tokens)).log()
    for request, visible in enumerate(VISIBLE):
        for head in range(KV_HEADS):
            hope = promise[:, request, head].amax(1)
            listed = sorted(
                ((page, part) for page in range(1, visible - 2) for part in range(MEANS)),
                key=lambda at: -float(hope[at[1], at[0]]),
            )[: 2 * 5 * MEANS]
            rows = slice(head * 3, head * 3 + 3)
            total: dict[int, Tensor] = {}
            wrong = torch.zeros(3)
            for page, part in listed:
                start = int(case.table[request, page]) * PAGE_SIZE + part * tokens
                key = case.kv.key[start : start + tokens, head] * 0.5
                true = (case.query[request, rows] * 0.2 @ key.T).logsumexp(-1)
                wrong += (true - estimate[part, request, rows, page]) / len(listed)
                share = true - mass[request, rows, 0]
                total[page] = torch.logaddexp(total.get(page, torch.full((3,), NEVER)), share)
            expected = sorted(total, key=lambda page: -float(total[page].max()))[:5]
            chosen = [page for page in found.pages[request, head].tolist() if page >= 0]
            assert chosen == sorted(expected)
            torch.testing.assert_close(found.correction[request, rows], wrong.clamp(max=0))


@pytest.mark.parametrize("budget", [1, 30, 100])
def test_blocks_choose_their_best_pages(kernels: ModuleType, monkeypatch, budget: int) -> None:
    monkeypatch.setattr(best, "KEYS_A_TILE", 16)
    plan = SparsePlan(sink_pages=2, window_pages=3, budget_pages=budget)
    score = torch.randint(-3, 4, (4, KV_HEADS, PAGES)).float()
    score[torch.rand(score.shape) < 0.2] = NEVER
    page = torch.tensor([70, 4, 0, 33])
    found = best.best_pages(score, page, plan)
    for block, own in enumerate(page.tolist()):
        for head in range(KV_HEADS):
            expected = sorted(first_of_best(score[block, head], own, plan))
            padding = [-1] * (budget - len(expected))
            assert found[block, head].tolist() == expected + padding


def test_the_same_numbers_give_the_same_choice(kernels: ModuleType) -> None:
    plan = SparsePlan(1, 2, 9, second_look=1, top_p=0.9)
    found = [Case(2).choose(kernels, plan) for _ in range(2)]
    assert torch.equal(found[0].pages, found[1].pages)
    assert torch.equal(found[0].correction, found[1].correction)


@pytest.mark.parametrize("name", ["token", "position", "page", "table"])
def test_a_wrong_tensor_of_the_steps_is_named(name: str) -> None:
    case = Case(1)
    case.steps = replace(case.steps, **{name: getattr(case.steps, name).double()})
    with pytest.raises(AssertionError, match=rf"^steps\.{name} "):
        case.choose(module, SparsePlan())


def test_a_wrong_query_is_named() -> None:
    case = Case(1)
    case.flat = case.flat[..., 1:]
    with pytest.raises(AssertionError, match=r"^query "):
        case.choose(module, SparsePlan())
