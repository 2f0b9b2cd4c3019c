"""``hip-sglang eval``: what it asks, keeps, and says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from hip_sglang import cli
from hip_sglang.bench import load_bench
from hip_sglang.demo.server import Server
from hip_sglang.demo.vocabulary import load_tokenizer
from tests.benchmarks.conftest import Rows
from tests.benchmarks.copying_server import CopyingServer

COPIED = "quotes,needle,multikey2,multikey3"

# a process of its own, whose servers are one that runs already
DRIVER = """
import sys
from contextlib import contextmanager
from hip_sglang import cli
from hip_sglang.bench import load_bench
from hip_sglang.demo.server import Server

@contextmanager
def serve(arguments, log):
    yield Server(sys.argv[1], 0.0)

load_bench("evaluate.run").serve = serve
sys.exit(cli.run(["eval", *sys.argv[2:]]))
"""


@pytest.fixture
def copying(model_directory: Path) -> Iterator[CopyingServer]:
    server = CopyingServer(load_tokenizer(model_directory))
    yield server
    server.close()


@pytest.fixture
def booted(copying: CopyingServer, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arguments of each server that was started; all are the one that copies."""
    started = []

    @contextmanager
    def serve(arguments: Sequence[str], log: Path) -> Iterator[Server]:
        started.append(list(arguments))
        yield Server(copying.url, 0.0)

    monkeypatch.setattr(load_bench("evaluate.run"), "serve", serve)
    return started


@pytest.fixture
def arguments(model_directory: Path, tmp_path: Path) -> list[str]:
    """A small evaluation; what comes later on a command line counts."""
    return [
        *("--model", str(model_directory), "--out", str(tmp_path / "out")),
        *("--tasks", "needle,multikey2", "--lengths", "1024", "--presets", "dense,balanced"),
        *("--samples", "3"),
    ]


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_each_preset_is_asked_the_same_and_the_report_says_how_it_did(
    booted: list[list[str]],
    copying: CopyingServer,
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ["--tasks", COPIED, "--lengths", "4096,2048"]
    assert cli.run(["eval", *arguments, *more, "--json"]) == 0
    assert [given[-1] for given in booted] == ["dense", "balanced"]
    assert all(given[given.index("--context-length") + 1] == "4096" for given in booted)
    assert len(copying.asked) == 2 * 4 * 2 * 3
    assert set(Counter(copying.asked).values()) == {2}
    assert {line["score"] for line in lines(tmp_path / "out")} == {1.0}
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| multikey3 | 4,096 | 100.0 (44-100) | 100.0 (44-100) |" in report
    assert "| all | 2,048 | +0.0 (-14 to +14) |" in report
    assert "nothing is pruned under any preset: queries at positions below 8,192" in report
    assert (tmp_path / "out" / "scores.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "100.0 (44-100)" in printed
    told = json.loads(printed.splitlines()[-1])["values"]
    assert told["2048.multikey2.balanced"] == 1
    assert told["4096.needle.dense.low"] == pytest.approx(0.44, abs=0.01)


def test_again_asks_only_what_is_missing(
    booted: list[list[str]], copying: CopyingServer, arguments: list[str]
) -> None:
    assert cli.run(["eval", *arguments]) == 0
    assert len(booted) == 2
    assert cli.run(["eval", *arguments]) == 0
    assert len(booted) == 2
    copying.asked.clear()
    assert cli.run(["eval", *arguments, "--samples", "4"]) == 0
    assert len(copying.asked) == 2 * 2
    copying.asked.clear()
    assert cli.run(["eval", *arguments, "--presets", "dense,balanced,paper"]) == 0
    assert len(copying.asked) == 2 * 3
    assert [given[-1] for given in booted[4:]] == ["paper"]


@pytest.mark.slow
def test_after_a_kill_only_what_is_missing_is_asked(
    booted: list[list[str]], copying: CopyingServer, arguments: list[str], tmp_path: Path
) -> None:
    many = [*arguments, "--samples", "40"]
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, copying.url, *many],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while len(copying.asked) < 50 and process.poll() is None:
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    out = tmp_path / "out"
    kept = (out / "results.jsonl").read_bytes().count(b"\n")
    assert 40 <= kept < 160
    # and the last line was half written
    with (out / "results.jsonl").open("ab") as file:
        file.write(b'{"question": {"preset": "bal')
    # what was on its way when it was killed may still arrive
    time.sleep(0.5)
    copying.asked.clear()
    assert cli.run(["eval", *many]) == 0
    assert len(copying.asked) == 160 - kept
    answered = [tuple(line["question"].values()) for line in lines(out)]
    assert len(answered) == len(set(answered)) == 160


def test_what_is_wrong_counts_and_presets_are_paired(
    booted: list[list[str]],
    copying: CopyingServer,
    arguments: list[str],
    saved: Rows,
    tmp_path: Path,
) -> None:
    # two of the second preset's three answers say nothing
    copying.silent_from = 5
    asked = [*arguments, "--tasks", "needle", "--save"]
    assert cli.run(["eval", *asked]) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    wrong = [line for line in lines(tmp_path / "out") if line["score"] == 0]
    assert [line["question"]["preset"] for line in wrong] == ["balanced"] * 2
    assert "| needle | 1,024 | 100.0 (44-100) | 33.3 (6-79) |" in report
    # 3 pairs and 2 more, no gain and a half, two losses and a half: -0.4 +- 1.96 sqrt(3 - 0.8) / 5
    assert "| needle | 1,024 | -66.7 (-98 to +18) |" in report
    rows = {row["metric"]: float(row["p50"]) for row in saved()}
    assert rows["needle.dense"] == 1
    assert rows["needle.balanced"] == 0.3333
    assert rows["needle.balanced.low"] == 0.06149


def test_settings_that_a_full_disk_cut_are_one_line(
    booted: list[list[str]],
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.run(["eval", *arguments]) == 0
    capsys.readouterr()
    (tmp_path / "out" / "settings.json").write_text("")
    assert cli.run(["eval", *arguments]) == 2
    error = capsys.readouterr().err
    assert "settings.json is no JSON; give another --out" in error
    assert error.count("\n") == 1


def test_the_built_in_model_is_written_once(
    booted: list[list[str]], written_once: None, arguments: list[str], tmp_path: Path
) -> None:
    asked = [*arguments, "--model", "builtin"]
    assert cli.run(["eval", *asked]) == 0
    written = (tmp_path / "out" / "model" / "config.json").stat().st_mtime_ns
    assert cli.run(["eval", *asked, "--samples", "4"]) == 0
    assert (tmp_path / "out" / "model" / "config.json").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--seed", "1"], "was begun with seed=0, and this is seed=1; give another --out"),
        (["--hip-config", '{"budget": 4096}'], "this is hip_config={'budget': 4096}"),
    ],
)
def test_other_settings_need_another_folder(
    booted: list[list[str]],
    arguments: list[str],
    more: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.run(["eval", *arguments]) == 0
    capsys.readouterr()
    assert cli.run(["eval", *arguments, *more]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert len(booted) == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--tasks", "nedle"], "there is no task 'nedle'; choose from quotes"),
        (["--tasks", ","], "--tasks is empty"),
        (["--lengths", "4k"], "--lengths 4k: give numbers of tokens, such as 4096,16384"),
        (["--lengths", "64"], "64 tokens are too short for the task"),
        (["--presets", "fast"], "preset='fast'"),
        (["--hip-config", '{"buget": 1}'], "unknown key 'buget'; did you mean budget?"),
        (["--model", "nowhere"], "--model nowhere: there is no config.json"),
        (["--doc", "nowhere"], "nowhere cannot be read"),
        (["--samples", "0"], "--samples"),
    ],
)
def test_what_cannot_be_used_is_one_line_before_any_server_starts(
    booted: list[list[str]],
    arguments: list[str],
    more: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.run(["eval", *arguments, *more]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1, error
    assert booted == []


def test_a_document_that_is_too_short_is_one_line(
    booted: list[list[str]],
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("".join(f"line {number} of it\n" for number in range(400)))
    asked = ["--tasks", "quotes", "--lengths", "2048,65536", "--doc", str(short)]
    assert cli.run(["eval", *arguments, *asked]) == 2
    error = capsys.readouterr().err
    assert "give a longer one, or a smaller length" in error
    assert error.count("\n") == 1
    assert booted == []


def test_a_server_that_refuses_is_one_line_and_what_was_answered_is_kept(
    booted: list[list[str]],
    copying: CopyingServer,
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.run(["eval", *arguments, "--samples", "1"]) == 0
    capsys.readouterr()
    copying.refuses = True
    assert cli.run(["eval", *arguments]) == 2
    error = capsys.readouterr().err
    # which of those that are asked at once says so first is chance
    assert re.search(r"the server answers 400 to \w+ of 1,024 tokens", error)
    assert "server-dense.log. What was answered is kept" in error
    assert error.count("\n") == 1
    assert len(lines(tmp_path / "out")) == 4


def test_two_evaluations_do_not_share_a_folder(
    booted: list[list[str]],
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = load_bench("evaluate.results").Results(tmp_path / "out")
    assert cli.run(["eval", *arguments]) == 2
    assert "another process writes it" in capsys.readouterr().err
    other.close()
    assert cli.run(["eval", *arguments]) == 0


def test_a_line_that_is_no_result_is_named(
    booted: list[list[str]],
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.jsonl").write_text('{"score": 1}\n')
    assert cli.run(["eval", *arguments]) == 2
    assert "results.jsonl line 1 is no result; take it out" in capsys.readouterr().err


@given(right=st.integers(0, 50), wrong=st.integers(0, 50))
def test_an_interval_of_right_and_wrong_is_wilson_s(right: int, wrong: int) -> None:
    if not right + wrong:
        return
    found = load_bench("evaluate.intervals").of_scores([1.0] * right + [0.0] * wrong)
    known = binomtest(right, right + wrong).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((known.low, known.high), abs=1e-6)
    assert 0 <= found.low <= found.mean <= found.high <= 1


def test_a_difference_by_hand() -> None:
    of_difference = load_bench("evaluate.intervals").of_difference
    # 8 pairs and 2 more; one gain and a half, half a loss: 0.1 +- 1.96 sqrt(2 - 1 / 10) / 10
    found = of_difference([0, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0])
    assert found.mean == 1 / 8
    assert (found.low, found.high) == pytest.approx((-0.17016, 0.37016), abs=1e-5)
    # where all agree it is not certain either
    found = of_difference([1.0] * 10, [1.0] * 10)
    assert found.mean == 0
    assert -found.low == found.high == pytest.approx(1.959964 / 12)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=40))
def test_a_difference_turns_with_its_sides(pairs: list[tuple[float, float]]) -> None:
    of_difference = load_bench("evaluate.intervals").of_difference
    first, second = zip(*pairs, strict=True)
    one, other = of_difference(first, second), of_difference(second, first)
    assert (one.mean, one.low, one.high) == pytest.approx((-other.mean, -other.high, -other.low))
    assert one.low - 1e-9 <= one.mean <= one.high + 1e-9


@pytest.mark.soak
@pytest.mark.server
def test_the_built_in_model_solves_what_can_be_copied(tmp_path: Path) -> None:
    asked = ["--tasks", COPIED, "--lengths", "4096", "--presets", "dense,balanced"]
    assert cli.run(["eval", *asked, "--samples", "5", "--out", str(tmp_path)]) == 0
    found = lines(tmp_path)
    assert len(found) == 2 * 4 * 5
    assert [line for line in found if line["score"] < 1] == []
