"""How near to dense: the synthetic errors, and the tokens of the built-in model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hip_kernels.layout import PAGE_SIZE, SparsePlan
from hip_kernels.stored import PagedKV

from hip_sglang.bench import load_bench
from hip_sglang.config import HipConfig
from hip_sglang.demo.corpus import Document, library_text
from hip_sglang.demo.exact import ExactDocument, ExactModel, attend_densely
from hip_sglang.demo.quotes import pick_quotes
from hip_sglang.demo.vocabulary import load_tokenizer
from tests.benchmarks.conftest import Rows

Case = load_bench("attention").Case
fidelity = load_bench("fidelity")
retrieval = load_bench("retrieval")
synthetic = load_bench("synthetic")

SHORT = "4096"
SMALL = {"budget": 512, "window": 256, "dense_threshold": 0}


def test_the_last_line_holds_four_errors_of_each_generator(
    bench: Callable[..., dict[str, Any]], saved: Rows
) -> None:
    arguments = ["--seeds", "2", "--length", SHORT, "--hip-config", json.dumps(SMALL), "--save"]
    found = bench("fidelity", *arguments)
    assert found["bench"] == "fidelity"
    assert found["config"]["seeds"] == 2
    assert set(found["values"]) == set(synthetic.GENERATORS)
    for errors in found["values"].values():
        assert set(errors) == {"ours", "paper", "oracle", "stream"}
        assert errors["oracle"] < errors["stream"]
    assert found["values"]["rope_mid"]["ours"] < found["values"]["rope_mid"]["oracle"]

    mean = next(row for row in saved() if row["metric"] == "torn.ours.mean")
    assert float(mean["p50"]) == pytest.approx(found["values"]["torn"]["ours"], rel=1e-2)
    assert json.loads(mean["config"])["length"] == int(SHORT)


def test_what_the_baselines_keep() -> None:
    context = synthetic.two_sided(0, 512)
    plan = SparsePlan(sink_pages=1, window_pages=2, budget_pages=1)
    tokens = torch.cat([torch.arange(PAGE_SIZE), torch.arange(5 * PAGE_SIZE, 512)])
    kept = context.scores()[tokens].softmax(0) @ context.value[tokens]
    torch.testing.assert_close(context.stream(plan), kept)
    best = [t for t in context.scores().argsort().tolist() if t not in set(tokens.tolist())]
    tokens = torch.cat([tokens, torch.tensor(best[-PAGE_SIZE:])])
    kept = context.scores()[tokens].softmax(0) @ context.value[tokens]
    torch.testing.assert_close(context.oracle(plan), kept)
    everything = SparsePlan(budget_pages=100)
    torch.testing.assert_close(context.oracle(everything), context.dense())


def test_keep_all_has_no_error() -> None:
    context = synthetic.GENERATORS["rope_mid"](0, int(SHORT))
    keep_all = HipConfig(preset="dense").layer_plan(0)
    assert context.error(fidelity.decoded(context, keep_all)) < 1e-5
    # below its threshold too it prunes: the question is what pruning costs
    assert context.error(fidelity.decoded(context, HipConfig().layer_plan(0))) > 1e-5


def test_one_mean_a_page_is_another_error() -> None:
    context = synthetic.GENERATORS["rope_mid"](0, int(SHORT))
    fine, coarse = (
        HipConfig.load({**SMALL, "sub_page_means": means}).layer_plan(0) for means in (True, False)
    )
    errors = [context.error(fidelity.decoded(context, plan)) for plan in (fine, coarse)]
    assert errors[0] != pytest.approx(errors[1], rel=1e-3)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({}, "balanced"),
        ({"preset": "paper"}, "paper"),
        ({"remainder": "log_cosh"}, "remainder=log_cosh"),
        ({"preset": "paper", "budget": 4096}, "paper,budget=4096"),
        # what is as it is by default, and not as the preset has it
        ({"preset": "paper", "remainder": "harmonic"}, "paper,remainder=harmonic"),
        ({"preset": "quality", "second_look": 8, "prefill": "sparse"}, "quality,prefill=sparse"),
    ],
)
def test_a_configuration_is_called_by_what_differs(given: dict[str, Any], name: str) -> None:
    assert fidelity.label(HipConfig.load(given)) == name


def test_the_model_is_asked_under_every_configuration(
    bench: Callable[..., dict[str, Any]], saved: Rows, written_once: None
) -> None:
    blind = {"preset": "paper", "budget": 64, "window": 64, "dense_threshold": 0}
    task = ["--context", SHORT, "--quote-tokens", "32", "--quotes", "3", "--new", "4"]
    configs = ["--hip-config", json.dumps(SMALL), "--hip-config", json.dumps(blind)]
    found = bench("fidelity", "--model", "--seeds", "0", *task, *configs, "--save")
    counts = found["values"]["model"]["quotes_32_at_4096"]
    small, forgetful = (fidelity.label(HipConfig.load(each)) for each in (SMALL, blind))
    assert counts["steps"] == counts["keep_all"] == counts[small] == 12
    assert counts[forgetful] < 12
    share = found["ratios"][f"quotes_32_at_4096_{forgetful}_share"]
    assert share == pytest.approx(counts[forgetful] / 12, abs=1e-4)

    rows = [row for row in saved() if json.loads(row["config"])["hip"] == forgetful]
    right = {row["metric"]: float(row["p50"]) for row in rows}
    assert right == {"right": counts[forgetful], "right.keep_all": 12}
    # another method has a row of its own
    (other,) = (
        float(row["p50"])
        for row in saved()
        if json.loads(row["config"])["hip"] == "InfiniteHiP" and row["metric"] == "right"
    )
    assert other == counts["InfiniteHiP"]


def test_the_cache_holds_what_the_steps_hold(model_directory: Path) -> None:
    tokenizer = load_tokenizer(model_directory)
    # the quote's tokens complete a node that lies before the window
    document = Document.cut(library_text(), tokenizer, 8128)
    exact = ExactDocument.of(ExactModel(model_directory), document.ids)
    cache = retrieval.Cache(exact, 256, {4})
    dense = HipConfig(preset="dense").layer_plan(1)
    little = {"budget": 64, "window": 64, "dense_threshold": 0}
    through_nodes = {**little, "node_threshold": 0, "beam": 512}
    plans = [HipConfig.load(each).layer_plan(1) for each in (little, through_nodes)]
    kept = load_bench("kept")
    all_of_it = kept.Kept(kept.METHODS["InfiniteHiP"], kept.Sizes(64, 64, 1 << 14))
    # a quote's tail takes the place of the one before
    for quote in pick_quotes(document, tokenizer, 2, continuation=160):
        steps = exact.teacher_forced(quote.suffix_ids, quote.expected_ids)
        cache.write(steps)
        last = replace(steps, queries=steps.queries[-1:], visible=steps.visible[-1:])
        torch.testing.assert_close(cache.attend(last, dense), attend_densely(last)[0])
        # all steps of a quote at once
        torch.testing.assert_close(cache.attend(steps, all_of_it), attend_densely(steps)[0])
        # a query that finds all keys alike sees every summary
        alike = replace(last, queries=torch.zeros_like(last.queries))
        afresh = PagedKV(*(page_aligned(x) for x in (steps.keys, steps.values)))
        case = Case.of(afresh, int(last.visible), 1, last.queries.shape[1], 4)
        for plan in plans:
            torch.testing.assert_close(cache.attend(alike, plan), case.ours(plan)(alike.queries))


def page_aligned(heads_first: torch.Tensor) -> torch.Tensor:
    """[Hkv, T, D] -> [whole pages, Hkv, D]."""
    rows = heads_first.transpose(0, 1)
    return torch.cat([rows, rows.new_zeros(-len(rows) % PAGE_SIZE, *rows.shape[1:])])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seeds", "many"], "invalid int value: 'many'"),
        (["--seeds", "-1"], "--seeds -1 is too small"),
        (["--seeds", "0"], "nothing to do"),
        (["--length", "64"], "--length 64 is too small"),
        (["--length", "5000"], "multiple of 512"),
        (["--model", "--context", "64"], "--context 64 is too small; give 2,048 or more"),
        (["--model", "--context", "2097152"], "has 1,048,576 positions"),
        (["--hip-config", '{"bugdet": 1}'], "did you mean budget?"),
        (["--model", "--seeds", "0", "--quote-tokens", "4"], "--quote-tokens 4"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    refused: Callable[..., str], arguments: list[str], words: str
) -> None:
    assert words in refused("fidelity", *arguments)
