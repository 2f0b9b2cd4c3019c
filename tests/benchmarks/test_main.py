"""``python -m benchmarks``: what it refuses, and that it tells two commits apart."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import EVAL, PROFILES, chosen, numbers
from hip_sglang.bench import bench_names

ROOT = Path(__file__).resolve().parents[2]


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_names_benchmarks_that_are_there(profile: str) -> None:
    for bench, _ in PROFILES[profile]:
        assert bench in (*bench_names(), EVAL) or (ROOT / "benchmarks" / bench).is_file()


def test_one_or_all_are_chosen() -> None:
    assert chosen("all", "quick") == PROFILES["quick"]
    assert [bench for bench, _ in chosen("growth", "quick")] == ["growth"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "attention", "--profile", "fast"], "choose one of quick, cpu, gpu"),
        (["run", "nothing"], "nothing is not in profile quick; it has attention,"),
        (["compare", "no-such-commit"], "no-such-commit"),
    ],
)
def test_what_cannot_be_used_is_said(arguments: list[str], said: str) -> None:
    done = program(*arguments)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.replace("│", " ").split())


def test_numbers_are_found_at_any_depth() -> None:
    told = {"ratios": {"a": 2}, "values": {"b": {"c": 0.5, "d": "text"}}}
    assert dict(numbers(told)) == {"ratios.a": 2, "values.b.c": 0.5}
