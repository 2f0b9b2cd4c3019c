"""The tables of docs/numbers.md come from the rows that the benchmarks save."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import pytest

from hip_sglang.bench import load_bench

ROOT = Path(__file__).resolve().parents[2]
SERVE = {"context": 65536, "new": 64, "rounds": 2, "torch_native": None, "hip": {}}
MODEL = {"part": "model", "context": 32768, "quote_tokens": 16, "quotes": 50, "new": 16}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tables of a folder of results that only this test has."""
    monkeypatch.setattr(load_bench("rows"), "RESULTS", tmp_path)
    return load_bench("numbers")


def save(bench: str, config: dict[str, Any], **samples: list[float]) -> None:
    """Rows of these metrics, a double underscore for a dot."""
    metrics = {name.replace("__", "."): ("unit", found) for name, found in samples.items()}
    load_bench("rows").save(bench, config, metrics)


def test_without_rows_there_is_no_section(write: ModuleType) -> None:
    assert write.serve_section() == write.fidelity_section() == write.gpu_section() == []
    assert write.eval_section() == []


def test_rows_of_a_gpu_are_shown_when_there_are_any(write: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "gpu_attention.csv"
    head = "date,git_sha,device,model,heads,kv_heads,width,context,batch,chunk,plan,what,step"
    cell = "2026-01-02,abc1234,A GPU,a model,32,8,128,131072,1,1,a plan"
    lines = [
        f"{head},p50_us,ratio,against",
        f"{cell},total,refresh,30,5,dense:fa3",
        f"{cell},select,refresh,10,,",
        f"{cell},total,refresh,20,7.5,dense:fa3",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    shown = write.gpu_section()[-1].splitlines()[2:]
    assert shown == [
        "| A GPU | a model (32/8/128) | 1 of 131,072, batch 1 | total, refresh; a plan | 20 us "
        "| **7.5x** dense:fa3 | 2026-01-02, abc1234 |"
    ]


def test_sglang_by_itself_is_shown_where_it_was_asked(write: ModuleType) -> None:
    found = {f"ratio__{name}": [2.0] for name in ("ttft", "decode", "ttft_sglang", "decode_sglang")}
    for name in ("ours", "keep_all", "sglang"):
        found |= {f"{name}__ttft": [3.0], f"{name}__decode": [50.0]}
    save("serve", {**SERVE, "model": "llama"}, **found)
    (row,) = write.serve_section()[-1].splitlines()[2:]
    assert "| llama, default |" in row
    assert "| 3.0 s, 50.0 tokens/s: **2.0x** (2.0-2.0) and **2.0x** (2.0-2.0) |" in row


def test_the_newest_run_of_the_server_is_shown(write: ModuleType) -> None:
    rest = {
        "ratio__decode": [1.5], "ours__ttft": [36.04], "ours__decode": [60.0],
        "keep_all__ttft": [90.0], "keep_all__decode": [40.0],
    }  # fmt: skip
    save("serve", SERVE, ratio__ttft=[9.0], **rest)
    save("serve", SERVE, ratio__ttft=[2.4, 2.5, 2.6], **rest)
    native = {"torch_native__ttft": [3.0], "torch_native__decode": [50.0]}
    save("serve", {**SERVE, "torch_native": 8192}, ratio__ttft=[7.0], **rest, **native)
    table = write.serve_section()[-1]
    first, second = table.splitlines()[2:]
    start = (
        "| 65,536 | default | 36.0 s, 60.0 tokens/s | 90.0 s, 40.0 tokens/s | **2.5x** (2.4-2.6)"
    )
    assert first.startswith(start)
    assert "9.0x" not in table
    assert "| 3.0 s, 50.0 tokens/s at 8,192 |" in second


def test_scores_of_tasks_are_shown_with_their_intervals(write: ModuleType) -> None:
    shape = {
        "model": "llama",
        "length": 16384,
        "samples": 50,
        "seed": 0,
        "page": 16,
        "hip": {"budget": 4096},
    }
    for dense in (0.5, 0.98):
        save("eval", shape, needle__dense=[dense], needle__dense__low=[0.895],
             needle__dense__high=[0.996], needle__paper=[0.5], needle__paper__low=[0.366],
             needle__paper__high=[0.634])  # fmt: skip
    (row,) = write.eval_section()[-1].splitlines()[2:]
    assert row.startswith(
        '| 16,384 | llama `{"budget": 4096}` | 16 | needle | 50 | '
        "dense 98.0 (90-100), paper 50.0 (37-63) | "
    )


def test_a_newer_run_keeps_what_it_found_before_it_repeated_an_older_one(
    write: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"model": "llama", "length": 16384, "samples": 50, "seed": 0, "hip": {}}

    def scores(preset: str) -> dict[str, list[float]]:
        names = f"needle__{preset}", f"needle__{preset}__low", f"needle__{preset}__high"
        return {name: [1.0] for name in names}

    for sha, presets in (("abc", ("paper", "balanced")), ("def", ("dense", "paper"))):
        monkeypatch.setattr(load_bench("rows"), "git_sha", lambda _, sha=sha: sha)
        save("eval", shape, **{name: of for p in presets for name, of in scores(p).items()})
    (row,) = write.eval_section()[-1].splitlines()[2:]
    assert "| dense 100.0 (100-100), paper 100.0 (100-100) |" in row
    assert "def" in row
    assert "abc" not in row


def test_means_and_right_tokens_are_shown(write: ModuleType) -> None:
    contexts = {"part": "synthetic", "seeds": 2, "length": 4096, "hip": "balanced"}
    samples = {"ours": [0.1, 0.9], "oracle": [0.2, 0.4], "paper": [1.0, 1.0], "stream": [2.0, 2.0]}
    found = {f"torn__{who}__{of}": [by(them)] for who, them in samples.items()
             for of, by in (("mean", fmean), ("worst", max))}  # fmt: skip
    save("fidelity", contexts, **found)
    found["torn__ours__mean"] = [0.7]
    save("fidelity", {**contexts, "hip": "second_look=0"}, **found)
    save("fidelity", {**MODEL, "hip": "paper"}, right=[600.0], right__keep_all=[800.0])
    text = "\n".join(write.fidelity_section())
    assert "mean of 2 seeds and the worst" in text
    table = text.partition("| chosen by | torn |\n| --- | --- |\n")[2].splitlines()[:5]
    assert table == [
        "| oracle | 0.300 (0.40) |", "| paper | 1.000 (1.00) |", "| stream | 2.000 (2.00) |",
        "| `balanced` | 0.500 (0.90) |", "| `second_look=0` | 0.700 (0.90) |",
    ]  # fmt: skip
    assert "| 32,768, 50 quotes of 16 | `paper` | 600 of 800 | 800 of 800 | 0.750 |" in text


def test_the_longest_context_that_all_were_asked_is_told(write: ModuleType) -> None:
    assert write.quality_words() == ""
    for context in (32768, 131072):
        for hip, right in (("balanced", 790.0), ("InfiniteHiP", 500.0), ("paper", 100.0)):
            if (context, hip) != (131072, "paper"):
                shape = {**MODEL, "context": context, "hip": hip}
                save("fidelity", shape, right=[right], right__keep_all=[800.0])
    told = write.quality_words()
    assert "over 32,768 tokens, dense attention gets 800 right" in told
    assert "ours 790, InfiniteHiP's stages 500, HiP as published 100" in told


def test_a_file_has_its_block_as_the_rows_say(
    write: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("fidelity", {**MODEL, "hip": "paper"}, right=[600.0], right__keep_all=[800.0])
    marks = "<!-- numbers: choice, written by `make numbers` -->", "<!-- end of numbers -->"
    monkeypatch.setattr(write, "ROOT", tmp_path)
    monkeypatch.setattr(write, "WITH_BLOCKS", ("some.md",))
    monkeypatch.setattr(write, "numbers", lambda: "")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "numbers.md").write_text("")
    path = tmp_path / "some.md"
    path.write_text(f"Before.\n\n{marks[0]}\nold\n{marks[1]}\n\nAfter.\n")
    (text,) = write.stale().values()
    assert text.startswith(f"Before.\n\n{marks[0]}\n\n`hip-sglang bench fidelity --model`")
    assert "| 600 of 800 | 800 of 800 | 0.750 | " in text
    assert text.endswith(f" |\n\n{marks[1]}\n\nAfter.\n")
    path.write_text(text)
    assert write.stale() == {}


# a time, a ratio, a share, or what a table has of errors
MEASURED = re.compile(r"\d+(\.\d+)?(x\b| ?%| ?(ms|us|s|nats|tokens/s|GiB/s)\b)|\b\d\.\d{2,}\b")
# what no row can hold: code, links, papers, versions, names of models, and bounds that tests hold
NO_NUMBER = re.compile(
    r"`[^`]*`|\]\([^)]*\)|arXiv \d+\.\d+"
    r"|\d+\.\d+\.\d+|95%|(Kubernetes|Python) \d[\d.]*( (or|to) \d[\d.]*)*"
)
WRITTEN = re.compile(
    r"<!-- (numbers|chaos): .*?<!-- end of \1 -->|<!-- bounds: .*?<!-- end of bounds -->", re.DOTALL
)


@pytest.mark.parametrize("name", ["README.md", "algorithm", "models", "operations", "structure"])
def test_every_number_is_of_a_row(name: str) -> None:
    path = ROOT / (name if name.endswith(".md") else f"docs/{name}.md")
    text = WRITTEN.sub("", path.read_text(encoding="utf-8"))
    assert [found[0] for found in MEASURED.finditer(NO_NUMBER.sub("", text))] == []


def test_an_orphan_is_found() -> None:
    for orphan in ("it is 3.5x as fast", "took 12 ms", "a share of 12%", "| 0.038 |", "by 2 nats"):
        assert MEASURED.search(NO_NUMBER.sub("", orphan)), orphan
    for fine in ("SGLang 0.5.21", "Kubernetes 1.29 to 1.35", "`top_p: 0.95`", "arXiv 2406.09827"):
        assert not MEASURED.search(NO_NUMBER.sub("", fine)), fine
