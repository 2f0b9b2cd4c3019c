"""What other methods keep: against sums by hand, and against dense where they keep everything."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hip_sglang.bench import load_bench
from hip_sglang.config import HipConfig
from hip_sglang.tune.judge import plans_of
from hip_sglang.tune.teacher import LayerKV, Teacher, divergence
from tests.benchmarks.conftest import Rows
from tests.tiny_llama import write_tiny_llama

kept = load_bench("kept")
contest = load_bench("contest")


def search(key: torch.Tensor, budget: int, query: torch.Tensor | None = None) -> Any:
    """One step over keys [T, D]."""
    query = torch.eye(key.shape[1])[:1] if query is None else query
    free = torch.ones(1, len(key), dtype=torch.bool)
    return kept.Search(query[None], key, free, budget)


def test_halving_goes_by_the_first_token_of_each_half() -> None:
    logits = torch.tensor([[1.0, 5, 9, 2, 1, 9, 3, 2]])
    # of the second chunk 9 is lost: its half begins with 1
    assert kept.representative(logits, 4).tolist() == [[9, 3]]


def test_the_oracle_keeps_the_best_tokens() -> None:
    key = torch.tensor([[1.0], [5], [3], [4]])
    assert kept.oracle(search(key, 2)).tolist() == [[False, True, False, True]]


def test_quest_bounds_what_a_page_can_weigh() -> None:
    torch.manual_seed(0)
    key, query = torch.randn(64, 8), torch.randn(2, 8)
    found = search(key, kept.PAGE, query)
    best = kept.quest(found)[0]
    assert best.sum() == kept.PAGE
    page = key.unflatten(0, (4, kept.PAGE))
    bound = torch.maximum(page.amin(1) * query[:, None], page.amax(1) * query[:, None]).sum(-1)
    assert (bound >= (query @ key.T).unflatten(1, (4, -1)).amax(-1) - 1e-6).all()
    assert int(best.nonzero()[0]) // kept.PAGE == int(bound.amax(0).argmax())


def test_pages_of_a_short_end_are_pages() -> None:
    key = torch.zeros(kept.PAGE + 3, 1)
    key[-2] = 40.0
    for choose in (kept.mean_keys, kept.quest):
        chosen = choose(search(key, kept.PAGE))[0]
        assert chosen.nonzero().flatten().tolist() == [16, 17, 18]


def test_three_stages_end_with_the_budget() -> None:
    torch.manual_seed(1)
    key = torch.randn(4096, 4)
    chosen = kept.three_stages(search(key, 64))
    assert int(chosen.sum()) == 64
    assert chosen.unflatten(1, (-1, 8)).all(-1).sum() == 8


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("oracle", 640),
        ("stream", 0),
        ("mean keys", 640 / 16),
        ("Quest", 2 * 640 / 16),
        # a key for each of the two halves of each halving: of chunks of 256, 32 and 8 tokens
        ("InfiniteHiP", 640 / 256 * 9 + 640 / 32 * 6 + 256 / 8 * 4),
    ],
)
def test_what_a_method_reads_is_counted_by_hand(name: str, keys: float) -> None:
    generator = torch.Generator().manual_seed(2)
    query, key = (torch.randn(n, 1, 8, generator=generator) for n in (1, 640))
    stored = LayerKV.empty(640, key, key)
    stored.write(0, key[:639], key[:639])
    by_it = kept.Kept(kept.METHODS[name], kept.Sizes(32, 32, 64))
    by_it.steps(0, query, stored, 639)
    exact = 32 + 32 + (0 if name == "stream" else 64)
    assert by_it.share_read == pytest.approx((2 * exact + keys) / (2 * 640))


def test_a_task_with_several_answers_is_for_a_server(refused: Callable[..., str]) -> None:
    said = refused("methods", "--task", "variables", "--documents", "1")
    assert "5 in any order; ask a server" in said


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return Teacher(write_tiny_llama(tmp_path_factory.mktemp("methods"), peak=3.0))


def test_who_keeps_everything_is_dense(teacher: Teacher) -> None:
    ids = torch.randint(1, 1000, (700,), generator=torch.Generator().manual_seed(1)).tolist()
    dense = plans_of(HipConfig(preset="dense"), teacher)
    document = teacher.read(ids[:-8], dense, 8)
    said = teacher.ask(document, ids[-8:], dense)
    apart = {}
    for name, method in kept.METHODS.items():
        all_of_it = kept.Kept(method, kept.Sizes(64, 64, 1 << 12))
        apart[name] = float(divergence(said, teacher.ask(document, ids[-8:], all_of_it)).max())
        assert all_of_it.share_read == 1 or name == "stream"
    # it keeps only what it always does
    assert apart.pop("stream") > 1e-4
    assert max(apart.values()) < 1e-6


def test_all_have_as_many_tokens() -> None:
    sizes = contest.sizes_of(4096, 1 / 8)
    # and the page that a query stands in
    assert sizes.sink + sizes.window + sizes.budget + 64 == 512
    with pytest.raises(ValueError, match="less than four pages"):
        contest.sizes_of(1024, 1 / 8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--share", "0.01"], "--share 0.01 of --context 4096 is less than four pages"),
        (["--steps", "4000"], "--context 4096 is too small"),
        (["--data", "/absent"], "the document /absent cannot be read"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    refused: Callable[..., str], arguments: list[str], words: str
) -> None:
    assert words in refused("methods", *arguments)


@pytest.mark.soak
def test_ours_is_nearer_to_dense_than_the_published_search(
    bench: Callable[..., dict[str, Any]], saved: Rows
) -> None:
    found = bench("methods", "--documents", "2", "--steps", "32", "--save")["values"]
    assert found["ours"]["kl"] < found["HiP as published"]["kl"] / 5
    assert found["dense"] == {"kl": 0, "same": 1, "read": 1}
    assert 1 / 8 <= found["ours"]["read"] < found["oracle"]["read"]
    assert {row["metric"] for row in saved()} >= {"ours.kl", "Quest.same.mean", "ours.read.mean"}


@pytest.mark.soak
@pytest.mark.parametrize("seed", ["3", "4"])
def test_on_a_trained_model_ours_is_nearer_to_dense_than_what_does_not_read_all_keys(
    bench: Callable[..., dict[str, Any]], seed: str
) -> None:
    arguments = ("--model", "trained", "--documents", "4", "--steps", "32", "--seed", seed)
    found = bench("methods", *arguments)["values"]
    others = {*kept.METHODS, "HiP as published"} - {"oracle"}
    # InfiniteHiP reads more than ours does by default, and as much as with a second look of 4
    assert found["ours"]["kl"] < min(found[name]["kl"] for name in others - {"InfiniteHiP"})
    as_much = found["ours, second look of 4"]
    assert as_much["kl"] < found["InfiniteHiP"]["kl"]
    assert as_much["read"] <= found["InfiniteHiP"]["read"]
    assert found["ours"]["kl"] < found["HiP as published"]["kl"] / 2


def in_pages_of_16(*arguments: str) -> dict[str, dict[str, float]]:
    """Of a process of its own: pages have one size from its start."""
    program = [sys.executable, "-c", "from hip_sglang.cli import main; main()", "bench", "methods"]
    more = ["--model", "trained", "--page-size", "16", "--json"]
    done = subprocess.run([*program, *arguments, *more], stdout=subprocess.PIPE, check=True)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told["values"]


@pytest.mark.soak
@pytest.mark.parametrize("seed", ["3", "4"])
def test_an_eighth_in_pages_of_16_says_what_dense_says(seed: str) -> None:
    found = in_pages_of_16("--documents", "6", "--seed", seed)
    assert found["ours"]["kl"] < found["HiP as published"]["kl"] / 5
    assert found["ours, second look of 8"]["kl"] < found["ours"]["kl"]


@pytest.mark.soak
def test_an_eighth_in_pages_of_16_tells_keys_apart_as_dense_does() -> None:
    found = in_pages_of_16("--documents", "40", "--task", "multikey2", "--seed", "3")
    assert found["dense"]["right"] > 0.5
    assert found["ours"]["right"] > found["dense"]["right"] - 0.06
    assert found["HiP as published"]["right"] < 0.1


@pytest.mark.soak
@pytest.mark.parametrize("task", ["needle", "quotes"])
def test_answers_are_counted_against_dense(bench: Callable[..., dict[str, Any]], task: str) -> None:
    found = bench("methods", "--task", task, "--documents", "4")["values"]
    assert found["dense"]["right"] == 1
    assert found["stream"]["right"] < 1
    assert found["stream"]["gain_low"] <= found["stream"]["gain"] == found["stream"]["right"] - 1


@pytest.mark.soak
def test_prompts_that_each_reads_itself(bench: Callable[..., dict[str, Any]]) -> None:
    asked = ("--own-prefill", "--model", "trained", "--documents", "2", "--steps", "16")
    found = bench("methods", *asked)["values"]
    # nobody else's method reads prompts
    assert set(found) == {"dense", *contest.OURS}
    assert 0 < found["ours"]["kl"] < found["HiP as published"]["kl"]
    assert found["ours"]["read"] == 1
    # and is asked by itself, which is farther
    whole = bench("methods", "--whole", *asked[1:])["values"]
    assert set(whole) == set(found)
    assert found["ours"]["kl"] < whole["ours"]["kl"] < whole["HiP as published"]["kl"]
    assert whole["ours"]["read"] < 1


def test_how_cost_grows_is_a_slope() -> None:
    assert load_bench("growth").exponent({1: [3.0], 4: [6.0], 16: [12.0]}) == pytest.approx(0.5)


@pytest.mark.soak
def test_a_step_grows_slower_than_the_context(bench: Callable[..., dict[str, Any]]) -> None:
    small = ["--lengths", "16K,64K", "--prompts", "16K,32K", "--rounds", "3", "--chunk", "64"]
    found = bench("growth", *small)["values"]
    assert found["exponent.decode"] < 1 < found["exponent.prefill"]
