"""The benchmark of offload: what a device keeps, by arithmetic and a real step; and the servers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hip_sglang.bench import load_bench
from tests.benchmarks.conftest import Rows

offload = load_bench("offload")


@pytest.mark.parametrize(("itemsize", "most"), [(4, 1 / 10), (2, 1 / 8)], ids=["float32", "half"])
def test_a_device_for_a_thirty_second_of_the_tokens_keeps_little_of_the_bytes(
    itemsize: int, most: float
) -> None:
    shares = offload.device_share(itemsize)
    assert shares["all"] == pytest.approx(sum(v for of, v in shares.items() if of != "all"))
    # six rows of summaries beside 64 keys and 64 values
    assert shares["summaries"] == pytest.approx(6 / 128, rel=0.01)
    assert shares["cache"] == pytest.approx(1 / 32)
    assert 0 < shares["scratch"] < 0.01
    assert shares["all"] < most


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--context", "64"], "--context 64 is too small; give 4,096 or more"),
        (["--share", "1"], "--share 1 is too small"),
        (["--context", "32768"], "--share 8 of --context 32768 is less than the 8,192 tokens"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    refused: Callable[..., str], arguments: list[str], words: str
) -> None:
    assert words in refused("offload", *arguments)


@pytest.mark.soak
def test_the_real_servers_are_measured(bench: Callable[..., dict[str, Any]], saved: Rows) -> None:
    small = ["--context", "16384", "--share", "2", "--new", "48", "--rounds", "1"]
    found = bench("offload", *small, "--save")
    assert found["ratios"]["decode_vs_resident"] > 0
    assert 0 < found["values"]["hit_ratio"] <= 1
    assert found["values"]["bytes_per_token"] > 0
    assert {row["metric"] for row in saved()} > {"ratio.decode_vs_resident", "hit_ratio"}
