"""The benchmark of prefixes: what it refuses, the tree alone, and the servers."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest

from hip_sglang.bench import load_bench
from tests.benchmarks.conftest import Rows


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--context", "64"], "--context 64 is too small; give 4,096 or more"),
        (["--new", "1"], "--new 1 is too small"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    refused: Callable[..., str], arguments: list[str], words: str
) -> None:
    assert words in refused("prefix", *arguments)


@pytest.mark.soak
def test_a_tree_of_many_prefixes_takes_little_longer_than_one_of_few() -> None:
    few, many = (
        statistics.median(load_bench("prefix").tree_seconds(count)) for count in (200, 10_000)
    )
    assert many < 5 * few


@pytest.mark.soak
def test_the_real_servers_are_measured(bench: Callable[..., dict[str, Any]], saved: Rows) -> None:
    small = ["--context", "16384", "--new", "24", "--rounds", "1"]
    found = bench("prefix", *small, "--save")
    assert found["values"]["known.tokens"] == found["values"]["restarted.tokens"] > 16000
    assert 0 < found["ratios"]["restarted_vs_cold"] < 0.5
    assert found["ratios"]["reading_vs_without_disk"] > 0
    assert {row["metric"] for row in saved()} > {"ratio.known_vs_step", "tree.step"}
