"""The kernels that choose pages, against sorting, on Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from hip_kernels.layout import PAGE_SIZE, Choice, SparsePlan, Summaries
from hip_kernels.select import best
from hip_kernels.select import choose as looking
from hip_kernels.select import triton as weighing
from hip_kernels.select.scores import Scores
from hip_kernels.steps import DecodeSteps
from hip_kernels.stored import PagedKV
from torch import Tensor

NEVER = float("-inf")
BATCH, KV_HEADS, MEANS, WIDTH = 3, 2, 4, 32
PAGES = 71
VISIBLE = (71, 3, 40)


@pytest.fixture
def kernels(
    interpreted: Callable[[ModuleType], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    # several tiles, the last of them not full, and more than one program to go through them
    for module in (weighing, looking):
        monkeypatch.setattr(module, "KEYS_A_TILE", 16)
    monkeypatch.setattr(weighing, "PROGRAMS", 2 * BATCH * KV_HEADS)
    interpreted(weighing)


class Case:
    """Logits of few values, so that many are equal, and hardly any; what is not seen is poison."""

    def __init__(self, group: int, *, parts_differ: bool = False, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.group, heads = group, KV_HEADS * group
        nan = float("nan")
        self.summaries = Summaries.empty(PAGES, KV_HEADS, WIDTH, WIDTH, means=MEANS)
        # a head asks for a channel of its own
        logit = torch.randint(-3, 4, (KV_HEADS, MEANS, PAGES, WIDTH)).float()
        if parts_differ:
            self.summaries.mean.copy_(logit + torch.randn(logit.shape))
            self.summaries.sigma.uniform_()
        else:
            logit[:, :, torch.rand(PAGES) < 0.2] = -1e30
            self.summaries.mean[:] = logit[:, :1]
        self.query = torch.eye(WIDTH)[:group].repeat(BATCH, KV_HEADS, 1)
        visible = torch.tensor(VISIBLE)
        self.table = torch.stack([torch.randperm(PAGES) for _ in range(BATCH)])
        for request, count in enumerate(VISIBLE):
            self.table[request, count + 1 :] = 1 << 30
        self.steps = DecodeSteps(
            # the flat batch has other rows, too, and so has what is kept
            token=torch.tensor([3, 0, 4]),
            position=visible * PAGE_SIZE + 5,
            page=visible,
            table=self.table,
            row=torch.tensor([1, 4, 0]),
            reuses=torch.zeros(BATCH, dtype=torch.int32),
        )
        rows = torch.randn(PAGES * PAGE_SIZE, KV_HEADS, WIDTH)
        self.kv = PagedKV(rows, rows, key_scale=0.5)
        self.flat = torch.full((5, heads, WIDTH), nan)
        self.flat[self.steps.token] = self.query
        self.weighed: Scores | None = None  # before a second look
        self.known: Tensor | None = None  # what each page weighs after it

    def choose(self, plan: SparsePlan) -> Choice:
        """What stands in the rows of all requests afterwards."""
        heads = KV_HEADS * self.group
        kept = Choice.empty(5, KV_HEADS, self.group, plan, "cpu")
        kept.entries.fill_(-7)
        kept.correction.fill_(7)
        scores = Scores.of(self.steps, heads, KV_HEADS, MEANS, plan)
        for tensor in (scores.page, scores.parts, scores.spread, scores.mass, scores.total):
            tensor.fill_(float("nan"))
        scratch = looking.Shortlist.of(scores, KV_HEADS, plan)
        given = self.flat, self.summaries, None, self.steps, kept, plan, 1.0, scores, scratch
        weighing.weigh(*given)
        of = scores.page.clone(), scores.parts.clone(), scores.spread.clone()
        self.weighed = replace(scores, **dict(zip(("page", "parts", "spread"), of, strict=True)))
        if plan.second_look:
            given = self.flat, self.kv, scores, scratch, self.steps, kept, plan, 0.2
            looking.look(*given)
        self.known = scores.page
        for row in (2, 3):
            assert (kept.entries[row] == -7).all()
        return Choice(kept.entries[self.steps.row], kept.correction[self.steps.row])

    @property
    def page(self) -> Tensor:
        """What each page was weighed to be, [B, Hq, P]."""
        assert self.weighed is not None
        return self.weighed.page.nan_to_num(nan=NEVER)

    def shares(self) -> Tensor:
        """[B, Hkv, G, P]"""
        share = self.page - self.page.logsumexp(-1, keepdim=True)
        return share.view(BATCH, KV_HEADS, -1, PAGES)


def first_of_best(score: Tensor, visible: int, plan: SparsePlan) -> list[int]:
    """Best first; of equal ones the first."""
    between = range(plan.sink_pages, visible - plan.window_pages)
    return sorted(between, key=lambda page: (-float(score[page]), page))[: plan.budget_pages]


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("budget", [1, 17, 200])
def test_the_first_of_the_best_are_chosen_in_order(kernels: None, group: int, budget: int) -> None:
    plan = SparsePlan(1, 2, budget, "mean")
    case = Case(group)
    found = case.choose(plan)
    share = case.shares().amax(2)
    for request, visible in enumerate(VISIBLE):
        for head in range(KV_HEADS):
            expected = sorted(first_of_best(share[request, head], visible, plan))
            padding = [-1] * (budget - len(expected))
            assert found.entries[request, head].tolist() == expected + padding
    assert not found.correction.any()


def test_a_share_of_the_mass_bounds_what_is_chosen(kernels: None) -> None:
    plan = SparsePlan(2, 1, 70, "mean", top_p=0.7)
    case = Case(3)
    found = case.choose(plan)
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
            chosen = [page for page in found.entries[request, head].tolist() if page >= 0]
            assert chosen == sorted(kept)
            counts.append((len(kept), len(order)))
    assert any(0 < kept < given for kept, given in counts)


@pytest.mark.parametrize("remainder", ["harmonic", "mean"])
@pytest.mark.parametrize("parts", [1, MEANS])
def test_a_second_look_reads_the_most_promising_sub_pages(
    kernels: None, remainder: str, parts: int
) -> None:
    plan = SparsePlan(1, 2, 5, remainder, second_look=2, parts=parts)
    case = Case(3, parts_differ=True)
    found = case.choose(plan)
    assert case.weighed is not None
    assert case.known is not None
    tokens = PAGE_SIZE // MEANS
    spread = case.weighed.spread if remainder == "harmonic" else torch.zeros(())
    mass = case.page.logsumexp(-1, keepdim=True)
    promise = (case.weighed.parts + spread - mass).view(MEANS, BATCH, KV_HEADS, 3, PAGES)
    estimate = case.weighed.parts + spread + torch.tensor(float(tokens)).log()
    for request, visible in enumerate(VISIBLE):
        for head in range(KV_HEADS):
            hope = promise[:, request, head].amax(1)
            listed = sorted(
                ((page, part) for page in range(1, visible - 2) for part in range(MEANS)),
                key=lambda at: -float(hope[at[1], at[0]]),
            )[: 2 * 5 * MEANS]
            rows = slice(head * 3, head * 3 + 3)
            total: dict[int, Tensor] = {}
            logit = estimate[:, request, rows].clone()
            wrong = torch.zeros(3)
            for page, part in listed:
                start = int(case.table[request, page]) * PAGE_SIZE + part * tokens
                key = case.kv.key[start : start + tokens, head] * 0.5
                true = (case.query[request, rows] * 0.2 @ key.T).logsumexp(-1)
                wrong += (true - estimate[part, request, rows, page]) / len(listed)
                share = true - mass[request, rows, 0]
                entry = page * parts + part * parts // MEANS
                total[entry] = torch.logaddexp(total.get(entry, torch.full((3,), NEVER)), share)
                logit[part, :, page] = torch.minimum(true, logit[part, :, page])
            expected = sorted(total, key=lambda entry: -float(total[entry].max()))[: 5 * parts]
            chosen = [entry for entry in found.entries[request, head].tolist() if entry >= 0]
            assert chosen == sorted(expected)
            wrong.clamp_(max=0)
            torch.testing.assert_close(found.correction[request, head], wrong)
            for page, part in listed:
                logit[part, :, page] -= wrong
                if parts > 1 and page * MEANS + part in chosen:
                    logit[part, :, page] = NEVER
            known = case.known[request, rows, :visible]
            torch.testing.assert_close(
                known, logit[..., :visible].logsumexp(0), rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("budget", [1, 30, 100])
def test_blocks_choose_their_best_pages(kernels: None, monkeypatch, budget: int) -> None:
    monkeypatch.setattr(best, "KEYS_A_TILE", 16)
    plan = SparsePlan(sink_pages=2, window_pages=3, budget_pages=budget)
    score = torch.randint(-3, 4, (4, KV_HEADS, PAGES)).float()
    score[torch.rand(score.shape) < 0.2] = NEVER
    page = torch.tensor([70, 4, 0, 33])
    found, _ = best.best_pages(score, page, plan)
    for block, own in enumerate(page.tolist()):
        for head in range(KV_HEADS):
            expected = sorted(first_of_best(score[block, head], own, plan))
            padding = [-1] * (budget - len(expected))
            assert found[block, head].tolist() == expected + padding


def test_the_same_numbers_give_the_same_choice(kernels: None) -> None:
    plan = SparsePlan(1, 2, 9, second_look=1, top_p=0.9)
    found = [Case(2, parts_differ=True).choose(plan) for _ in range(2)]
    assert torch.equal(found[0].entries, found[1].entries)
    assert torch.equal(found[0].correction, found[1].correction)


@pytest.mark.parametrize("second_look", [0, 1])
def test_what_is_used_again_or_dense_is_left_alone(kernels: None, second_look: int) -> None:
    plan = SparsePlan(1, 2, 9, second_look=second_look)
    case = Case(2, parts_differ=True)
    before = case.choose(plan)
    reuses = torch.tensor([1, 0, 0], dtype=torch.int32)
    case.steps = replace(case.steps, reuses=reuses, sparse_from=4)
    found = case.choose(plan)
    for request in (0, 1):
        assert (found.entries[request] == -7).all()
        assert (found.correction[request] == 7).all()
    assert torch.equal(found.entries[2], before.entries[2])
    assert torch.equal(found.correction[2], before.correction[2])


@pytest.mark.parametrize("name", ["token", "position", "page", "table", "row", "reuses"])
def test_a_wrong_tensor_of_the_steps_is_named(name: str) -> None:
    case = Case(1)
    case.steps = replace(case.steps, **{name: getattr(case.steps, name).double()})
    with pytest.raises(AssertionError, match=rf"^steps\.{name} "):
        case.choose(SparsePlan())


def test_a_wrong_query_is_named() -> None:
    case = Case(1)
    case.flat = case.flat[..., 1:]
    with pytest.raises(AssertionError, match=r"^query "):
        case.choose(SparsePlan())
