"""The search: it learns, it goes on where it was killed, and the same seed finds the same."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks.tuning import drawn, hypervolume
from hip_sglang.config import HipConfig
from hip_sglang.tune.search import Trial, Trials, Values, front, search
from hip_sglang.tune.space import Genes, Space

# beyond it nothing counts
WORST = (9.0, 1.1)
PROMPT = 1 << 20
SPACE = Space.of(HipConfig.load({"budget": 1024}), layers=12, prompt=PROMPT)


def judge(genes: Genes) -> Values:
    """Made up: groups matter unequally, a second look helps, and what is read costs."""
    divergence = share = 0.0
    for group in range(len(SPACE.groups)):
        read = 1.0
        if not genes[f"dense.{group}"]:
            read = genes[f"budget.{group}"] / 4096 * genes[f"top_p.{group}"] ** 4
            read /= genes[f"refresh.{group}"] ** 0.3
            look = genes[f"second_look.{group}"]
            divergence += (1 - read) ** 2 * (4 if group in (1, 5) else 0.1) / (1 + look)
            read = min(1.0, read * (1 + look / 8))
        share += read / len(SPACE.groups)
    return divergence, share


def test_layers_are_grouped_in_order() -> None:
    assert [layer for group in SPACE.groups for layer in group] == list(range(12))
    assert len(SPACE.groups) == 8
    # what is given, dense, another refresh and top_p; five budgets, and two smaller windows, each
    # with three second looks, by one mean a page and by four
    assert len(SPACE.uniform()) == 4 + (5 + 2) * 3 * 2 - 1
    # and three of each group
    assert len(SPACE.start()) == len(SPACE.uniform()) + 8 * 3
    assert Space.of(HipConfig(), layers=2, prompt=PROMPT).groups == ((0,), (1,))


def test_genes_become_a_configuration() -> None:
    genes = SPACE.uniform()[0]
    config = SPACE.config(genes)
    assert [config.layer_plan(n).pages.budget_pages for n in range(12)] == [16] * 12
    layers = SPACE.groups[3]
    changed = SPACE.config(
        {
            **genes,
            **{"window": 256, "sub_page_means": False},
            **{"dense.0": True, "budget.3": 128, "refresh.3": 4, "second_look.3": 8},
        }
    )
    assert {changed.layer_plan(n).means for n in range(12)} == {1}
    assert changed.layer_plan(layers[0]).pages.window_pages == 4
    assert changed.layer_plan(layers[0]).pages.second_look == 8
    assert set(changed.dense_layers) == set(SPACE.groups[0])
    assert changed.layer_plan(layers[0]).pages.budget_pages == 2
    assert changed.layer_plan(layers[0]).refresh == 4
    assert changed.budget == 1024


def test_a_search_begins_with_what_each_group_is_worth() -> None:
    plain = SPACE.uniform()
    first, less, alone, longer, *_ = SPACE.start()
    assert first == plain[0]
    changed = [{name for name in first if genes[name] != first[name]} for genes in (less, alone)]
    assert changed[0] == {"budget.0", "second_look.0"}
    assert changed[1] == {f"{name}.{n}" for n in range(1, 8) for name in ("budget", "second_look")}
    assert longer == {**alone, "second_look.0": 8}
    assert (less["budget.0"], less["second_look.0"]) == (128, 0)


@pytest.mark.parametrize("config", [{"offload": {"host_gib": 1}}, {"preset": "paper"}])
def test_a_second_look_is_not_searched_for_where_there_should_be_none(
    config: dict[str, object],
) -> None:
    space = Space.of(HipConfig.load(config), layers=2, prompt=PROMPT)
    plans = [space.config(genes).layer_plan(0) for genes in space.start()]
    assert {plan.pages.second_look for plan in plans} == {HipConfig.load(config).second_look}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"preset": "dense"}, "prunes nothing"),
        ({"dense_layers": [0]}, "leave them out"),
        ({"budget": 4096}, "pruning begins at 5,248"),
    ],
)
def test_what_leaves_nothing_to_find_is_refused(config: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Space.of(HipConfig.load(config), layers=4, prompt=4096)


def test_what_is_given_is_tried_as_it_is() -> None:
    given = HipConfig.load({"refresh": 16, "top_p": 0.7, "second_look": 5})
    (first, *_) = Space.of(given, layers=2, prompt=PROMPT).start()
    assert [first[f"{name}.1"] for name in ("refresh", "top_p", "second_look")] == [16, 0.7, 5]


def test_no_budget_leaves_all_layers_dense() -> None:
    budgets = Space.of(HipConfig(), layers=2, prompt=4032).options()["budget.0"]
    # with one of 4,096 tokens nobody would prune before the 5,248th
    assert budgets == [256, 512, 1024, 2048]


def test_a_front_is_what_nothing_is_better_than() -> None:
    given: list[Values] = [(3, 1), (1, 3), (2, 2), (2, 3), (3, 3), (2, 2)]
    found = front(Trial({}, values) for values in given)
    assert [trial.values for trial in found] == [(3, 1), (2, 2), (1, 3)]


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_more_than_chance(tmp_path: Path, seed: int) -> None:
    found = searched(tmp_path / "trials.jsonl", judge, 240, seed)
    by_chance = [judge(genes) for genes in drawn(SPACE, 240, seed)]
    area = hypervolume([trial.values for trial in found], WORST)
    assert area > 1.02 * hypervolume(by_chance, WORST)


def test_nothing_is_tried_twice(tmp_path: Path) -> None:
    found = searched(tmp_path / "trials.jsonl", judge, 240, seed=2)
    assert len({SPACE.config(trial.genes) for trial in found}) == 240


def test_a_small_space_ends_a_search(tmp_path: Path) -> None:
    small = Space.of(HipConfig.load({"preset": "paper", "window": 64, "budget": 64}), 1, PROMPT)
    with closing(Trials(tmp_path / "trials.jsonl")) as trials:
        found = search(small, judge_small, 10_000, trials)
    # budgets of one and two pages, top_p and refresh; or dense
    assert 20 < len(found) <= 2 * 4 * 4 + 1


def judge_small(genes: Genes) -> Values:
    return float(genes["budget.0"]), float(genes["top_p.0"])


def searched(path: Path, judge: Callable[[Genes], Values], count: int, seed: int) -> list[Trial]:
    with closing(Trials(path)) as trials:
        return search(SPACE, judge, count, trials, seed=seed)


def test_it_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    whole = searched(tmp_path / "whole.jsonl", judge, 100, seed=5)
    path, judged = tmp_path / "killed.jsonl", []

    def counted(genes: Genes) -> Values:
        judged.append(genes)
        if len(judged) in (30, 85):
            raise KeyboardInterrupt
        return judge(genes)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            searched(path, counted, 100, seed=5)
        # the line that a kill tore
        with path.open("a") as file:
            file.write('{"genes": {"budg')
    found = searched(path, counted, 100, seed=5)
    assert found == whole
    assert len(judged) == 102
    assert (tmp_path / "whole.jsonl").read_bytes() == path.read_bytes()


def test_trials_of_another_search_are_refused(tmp_path: Path) -> None:
    searched(tmp_path / "trials.jsonl", judge, 90, seed=1)
    with pytest.raises(ValueError, match="of another search; give another --out"):
        searched(tmp_path / "trials.jsonl", judge, 90, seed=2)


def test_two_searches_do_not_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    with closing(Trials(path)), pytest.raises(ValueError, match="another process writes it"):
        searched(path, judge, 30, seed=1)
