"""What the demo shows: the trace read back, the picture and the report."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from hip_sglang.demo.picture import draw_selections
from hip_sglang.demo.program import Answer, Speed
from hip_sglang.demo.quotes import Quote
from hip_sglang.demo.report import DemoReport, Residency, RunResult
from hip_sglang.demo.selections import mean_share_read, read_trace, share_held

TOKENS = 65536


def quote(depth: float, expected: str = "a = 1") -> Quote:
    target = int(depth * TOKENS)
    return Quote(depth, target, "\nquoted", (1, 2), expected, (3, 4))


def answers() -> list[Answer]:
    depths = np.linspace(0.05, 0.95, 10)
    got = ["a = 1"] * 9 + ["b = 2"]
    return [Answer(quote(float(depths[i])), got[i], f"r{i}") for i in range(10)]


def run_result(name: str, kv_read_share: float = 1.0) -> RunResult:
    speed = Speed(prompt_tokens=65400, ttft_s=31.25, decode_tokens_per_s=40.5)
    return RunResult(name, TOKENS, 65400, 55.0, speed, tuple(answers()), kv_read_share)


def step(rid: str, layer: int, chosen: list[list[int]]) -> dict[str, Any]:
    return {
        "rid": rid,
        "layer": layer,
        "position": 65500,
        "visible_pages": 1023,
        "sink_pages": 1,
        "window_pages": 16,
        "chosen": chosen,
        # the device holds every other page
        "held": [pages[::2] for pages in chosen],
        "kv_read_share": 0.125 if layer else 0.075,
    }


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    lines = []
    for index, answer in enumerate(answers()):
        page = answer.quote.target // 64
        # the last answer's page was not found
        near = list(range(page - 8, page + 8)) if index < 9 else list(range(300, 316))
        for layer in (0, 1):
            lines += [step(f"r{index}", layer, [near, list(range(100, 132))]) for _ in range(3)]
    lines.append(step("warmup", 0, [[5], [6]]))
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_trace_is_read_by_request(trace_file: Path) -> None:
    trace = read_trace(trace_file)
    assert len(trace) == 11
    first = trace["r0"]
    assert [s.layer for s in first] == [0, 0, 0, 1, 1, 1]
    assert first[0].chosen[1] == frozenset(range(100, 132))
    assert first[0].share_read == 0.075
    assert share_held(first) == pytest.approx(0.5)
    assert mean_share_read(first) == pytest.approx(0.1)


def test_where_nothing_is_pruned_everything_is_read(tmp_path: Path) -> None:
    assert read_trace(tmp_path / "missing.jsonl") == {}
    assert mean_share_read([]) == 1.0
    assert share_held([]) == 1.0


def color_share(picture: np.ndarray, color: str) -> float:
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return float((np.abs(picture[..., :3] - wanted).max(-1) < 0.02).mean())


def test_the_picture_marks_chosen_pages_and_answers(trace_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    draw_selections(path, run_result("HiP"), read_trace(trace_file))
    picture = imread(path)
    assert picture.shape[1] > 1500
    for color in ("#1f77b4", "#e07b00", "#9aa5b1", "#c1121f"):
        assert color_share(picture, color) > 0.0005, color
    # the first head chose half as many pages as the second
    assert color_share(picture, "#1f77b4") < color_share(picture, "#e07b00")


def test_the_picture_is_drawn_without_a_trace_too(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    draw_selections(path, run_result("HiP"), {})
    picture = imread(path)
    assert color_share(picture, "#9aa5b1") > 0.3
    assert color_share(picture, "#e07b00") < 0.01


@pytest.mark.parametrize(
    ("got", "correct"),
    [("a = 1", True), ("a = 1\N{REPLACEMENT CHARACTER}", True), ("a = 1 ", False), ("a", False)],
)
def test_an_answer_is_right_when_it_is_the_documents_text(got: str, correct: bool) -> None:
    assert Answer(quote(0.5), got, "r").correct is correct


def test_the_report_names_every_quote_run_and_the_machine() -> None:
    runs = (run_result("HiP (balanced)", 0.04), run_result("HiP keep-all"))
    report = DemoReport("a document", runs, (Answer(answers()[9].quote, "a = 1", "x"),))
    content = json.loads(json.dumps(report.as_json()))
    assert [entry["correct"] for entry in content["quotes"]] == [True] * 9 + [False]
    assert content["quotes"][9]["keep_all_correct"] is True
    assert content["quotes"][0]["keep_all_correct"] is None
    assert content["quotes"][9]["got"] == "b = 2"
    assert content["runs"][0] == {
        "name": "HiP (balanced)",
        "context": 65536,
        "document_tokens": 65400,
        "boot_s": 55.0,
        "ttft_s": 31.25,
        "decode_tokens_per_s": 40.5,
        "kv_read_share": 0.04,
        "quotes_right": 9,
        "quotes": 10,
        "residency": None,
    }
    assert content["provenance"]["versions"]["sglang"]
    assert content["provenance"]["machine"]["cores"] >= 1


def test_a_quote_is_lost_only_where_keep_all_had_it() -> None:
    wrong = answers()[9].quote
    runs = (run_result("HiP (balanced)"),)
    assert DemoReport("", runs, ()).lost == 0
    assert DemoReport("", runs, (Answer(wrong, "c", "x"),)).lost == 0
    assert DemoReport("", runs, (Answer(wrong, "a = 1", "x"),)).lost == 1


def test_the_tables_fit_a_terminal() -> None:
    output = io.StringIO()
    console = Console(file=output, width=80)
    names = ("HiP (balanced)", "HiP keep-all", "SGLang torch_native")
    runs = tuple(run_result(name, 0.04) for name in names)
    for table in DemoReport("", runs, ()).tables():
        console.print(table)
    text = output.getvalue()
    assert text.count("✗") == 3
    assert all(text.count(f"{name} 64K") == 2 for name in names)
    assert "9 of 10" in text
    assert "4.0%" in text
    assert "…" not in text


def test_a_device_that_holds_little_is_reported(trace_file: Path, tmp_path: Path) -> None:
    run = replace(run_result("HiP"), residency=Residency(8192, 0.5))
    assert run.as_json()["residency"] == {"device_tokens": 8192, "held_share": 0.5}
    sentence = run.residency.sentence(run.document_tokens)
    assert "8,192 of 65,400 tokens" in sentence
    assert "50%" in sentence
    plain, marked = tmp_path / "plain.png", tmp_path / "marked.png"
    trace = read_trace(trace_file)
    draw_selections(marked, run, trace)
    everything_held = {
        rid: [replace(step, held=step.chosen) for step in steps] for rid, steps in trace.items()
    }
    draw_selections(plain, run, everything_held)
    dark = [color_share(imread(picture), "#111111") for picture in (plain, marked)]
    assert dark[1] > dark[0] + 0.001, "pages that were fetched are marked"
