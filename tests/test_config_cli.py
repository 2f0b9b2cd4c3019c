"""``hip-sglang config``: the schema agrees with the loader, the explanation with the kernels."""

import json
import subprocess
import sys

import jsonschema
import pytest
import torch
from hip_kernels.layout import PAGE_SIZE, Summaries
from hip_kernels.ops import attend, plan_blocks, summarize
from hip_kernels.stored import PagedKV

from hip_sglang import cli
from hip_sglang.config import HipConfig
from hip_sglang.config_text import ConfigError
from hip_sglang.explain import StepAt, grouped, parse_lengths, sentences

SMALL = {"sink": 64, "window": 128, "budget": 192, "dense_threshold": 700}


def output(capsys, *arguments):
    assert cli.run(["config", *arguments]) == 0
    return capsys.readouterr().out


def test_the_schema_is_one_json_document_in_a_stable_order(capsys):
    schema = json.loads(output(capsys, "schema"))
    jsonschema.Draft202012Validator.check_schema(schema)
    assert list(schema["properties"]) == list(HipConfig.model_fields)
    assert all("description" in field for field in schema["properties"].values())
    code = "from hip_sglang.cli import run; run(['config', 'schema'])"
    texts = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "12"
    }
    assert len(texts) == 1


@pytest.mark.parametrize(
    "values",
    [
        {},
        SMALL,
        {"preset": "paper", "dense_layers": [0, 1], "trace": None},
        {"budget": 63},
        {"budget": "many"},
        {"bugdet": 4096},
        {"preset": "fast"},
        {"sub_page_means": 1},
        {"dense_layers": [-1]},
    ],
    ids=str,
)
def test_the_schema_takes_what_the_configuration_takes(values, capsys):
    schema = json.loads(output(capsys, "schema"))
    try:
        HipConfig.load(values)
        right = True
    except ConfigError:
        right = False
    assert jsonschema.Draft202012Validator(schema).is_valid(values) == right


def attended(config, length, prompt):
    """What the kernels attend to: (exact tokens, pruned pages) of the last row; how many prune."""
    pages = -(-length // PAGE_SIZE)
    torch.manual_seed(0)
    kv = PagedKV(torch.randn(pages * PAGE_SIZE, 1, 8), torch.randn(pages * PAGE_SIZE, 1, 8))
    summaries = Summaries.empty(pages, 1, 8, 8)
    summarize(kv, torch.arange(length // PAGE_SIZE), summaries)
    plan = config.layer_plan(0)
    prefix = 0 if prompt else length - 1
    query = torch.randn(length - prefix, 1, 8)
    last, sparse_rows = (length, 0), 0
    for blocks in plan_blocks(
        [prefix],
        [length],
        torch.arange(pages)[None],
        sparse_from=plan.sparse_from,
        sparse_decode_from=plan.sparse_decode_from,
    ):
        found = attend(query, kv, summaries, blocks, plan.pages, 1.0, torch.empty_like(query))
        if found is not None:
            sparse_rows += int((blocks.position >= 0).sum())
            exact, own = float(found.exact[-1, 0]), int(blocks.page[-1])
            # the last of them is the own page, which may not be full
            tokens = (exact - 1) * PAGE_SIZE + length - PAGE_SIZE * own
            last = (tokens, own + 1 - exact)
    return *last, sparse_rows


@pytest.mark.parametrize("length", [1, 64, 448, 512, 703, 704, 705, 768, 1000, 1024, 1500])
@pytest.mark.parametrize("changed", [{}, {"dense_threshold": 0}, {"preset": "quality"}], ids=str)
def test_the_explanation_is_what_the_kernels_do(length, changed):
    config = HipConfig.load(SMALL | changed)
    step = StepAt.of(config.layer_plan(0), length)
    exact, pruned, sparse = attended(config, length, prompt=False)
    assert (step.exact_tokens, step.pruned_pages, step.sparse) == (exact, pruned, sparse > 0)
    *_, sparse_rows = attended(config, length, prompt=True)
    assert step.sparse_queries * length == pytest.approx(sparse_rows)


def test_the_explanation_of_a_dense_step_reads_everything():
    plan = HipConfig.load(None, "dense").layer_plan(0)
    assert StepAt.of(plan, 1 << 20) == StepAt(1 << 20, 0.0, False, 1 << 20, 0, 1.0)
    assert sentences(plan) == [
        "prefill: dense at every position",
        "decode: dense at every position",
    ]


def test_the_share_read_is_that_of_the_plan():
    plan = HipConfig.load().layer_plan(0)
    step = StepAt.of(plan, 131072)
    assert step.share_read == plan.share_read(2047, 50)
    assert 0.05 < step.share_read < 0.15


def test_explain_groups_layers_of_equal_plans(capsys):
    config = HipConfig.load({"dense_layers": [0, 3, 4]})
    plans = [config.layer_plan(layer) for layer in range(6)]
    assert [name for name, _ in grouped(plans)] == ["layers 0, 3-4", "layers 1-2, 5"]
    shown = output(capsys, "explain", "--hip-config", '{"dense_layers": [0]}', "--layers", "2")
    assert shown.index("layer 0\n") < shown.index("layer 1\n")
    assert "dense at every position" in shown.split("layer 1\n")[0]
    assert "dense at positions below 8,192, sparse from there" in shown.split("layer 1\n")[1]


def test_explain_shows_a_row_a_length(capsys):
    shown = output(capsys, "explain", "--lengths", "128K, 8192,1m")
    rows = [line.split() for line in shown.splitlines() if line.rstrip().endswith("%")]
    assert [row[0] for row in rows] == ["8K", "128K", "1M"]
    assert rows[0][1:] == ["dense", "dense", "8,192", "0", "100.0%"]
    assert rows[1][1:6] == ["93.8%", "sparse", "sparse", "3,200", "1,998"]


def test_explain_says_what_becomes_of_the_other_pages(capsys):
    assert "pages dropped" in output(capsys, "explain", "--hip-preset", "paper")
    assert "pages estimated" in output(capsys, "explain", "--hip-preset", "quality")


def test_lengths_are_sorted_and_each_is_shown_once():
    assert parse_lengths("8K,64,8192,1M") == [64, 8192, 1 << 20]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["explain", "--lengths", "4X"], "'4X' is not a number of tokens"),
        (["explain", "--lengths", "0"], "'0' is not a number of tokens"),
        (["explain", "--lengths", "4K,"], "'' is not a number of tokens"),
        (["explain", "--lengths", "9999999999M"], "from 1 to 1024M"),
        (["explain", "--hip-preset", "x"], "preset='x'"),
        (["explain", "--hip-config", '{"dense_layers": [9]}', "--layers", "9"], "0 to 8"),
        (["show", "--hip-config", '{"dense_layers": [9]}', "--layers", "9"], "0 to 8"),
        (["explain", "--layers", "0"], "--layers"),
        (["schema", "extra"], "extra"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, message, capsys):
    assert cli.run(["config", *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
