"""The GPU benchmark, dry: on Triton's interpreter, as a user would run it."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hip_sglang.bench import load_bench

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "benchmarks/gpu/attention.py"
DRY = ("--interpret", "--tiny")

attention = load_bench("gpu.attention")
exact = load_bench("gpu.exact")

pytestmark = pytest.mark.interpreter


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # as on a machine where nobody has set anything
    env = {
        name: value for name, value in os.environ.items() if name not in ("OUT", "TRITON_INTERPRET")
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=env | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.soak
def test_a_dry_run_checks_every_kernel_and_writes_every_kind_of_row(tmp_path: Path) -> None:
    done = python(SCRIPT, *DRY, "--out", str(tmp_path), HIP_SGLANG_SHA="abc1234")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for kernel in ("summarize", "pool", "weigh", "choose (decode)", "attend (decode)"):
        assert f"{kernel} is right at tiny" in done.stdout

    (path,) = tmp_path.glob("*.csv")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # nothing here may pass for a number of a GPU
    assert path.name == "gpu_attention.interpreter.csv"
    assert {(row["device"], row["timing"]) for row in rows} == {("interpreter", "wall")}
    assert {row["share_of_bandwidth"] for row in rows} == {""}
    assert {row["git_sha"] for row in rows} == {"abc1234"}

    kinds = {(row["what"], row["step"]) for row in rows}
    assert kinds >= {
        *(("summarize", "refresh"), ("select", "refresh"), ("select", "cached")),
        *(("attend", "cached"), ("total", "refresh"), ("total", "cached")),
        *(("keep_all", "decode"), ("dense:sdpa", "decode"), ("dense:sdpa", "prefill")),
        *(("total", "prefill"), ("attend", "prefill"), ("keep_all", "prefill")),
    }
    assert {row["batch"] for row in rows} == {"1", "2"}
    for check in (
        "attend (decode) is right at tiny (4/2/32) float32, lengths 2560+2490, nodes",
        "attend (prefill) is right at tiny (4/2/32) float32, lengths 2560, chunk 64, nodes",
    ):
        assert check in done.stdout
    through_nodes = {(row["what"], row["step"]) for row in rows if "nodes" in row["plan"]}
    assert {("total", "cached"), ("select", "cached")} <= through_nodes
    assert {("total", "prefill"), ("select", "prefill")} <= through_nodes
    for row in rows:
        assert 0 < float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        compared = row["what"] in ("total", "keep_all", "dense:sdpa")
        assert bool(row["ratio"]) == compared == bool(row["against"])
        assert bool(row["bytes"]) == (row["chunk"] == "1")


# what stands in for a mistake in a kernel: a launcher whose result is not quite right
WRONG = """
import sys
from inspect import signature
from hip_kernels.{module} import {launcher} as right
import {user} as user
def wrong(*given):
    found = right(*given)
    out = signature(right).bind(*given).arguments["out"]
    {spoil}
    return found
user.{launcher} = wrong
from benchmarks.gpu.attention import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("kernel", "module", "launcher", "user", "spoil"),
    [
        (
            *("summarize", "summarize.triton", "summarize", "benchmarks.gpu.cases"),
            "out.value.mul_(1.01)",
        ),
        (
            *("attend (decode)", "attend.triton", "decode", "hip_kernels.attend.fused"),
            "out.mul_(1.01)",
        ),
    ],
)
def test_a_wrong_kernel_is_named_and_the_run_fails(
    tmp_path: Path, kernel: str, module: str, launcher: str, user: str, spoil: str
) -> None:
    source = WRONG.format(module=module, launcher=launcher, user=user, spoil=spoil)
    done = python("-c", source, *DRY, "--out", str(tmp_path), TRITON_INTERPRET="1")
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"correctness: {kernel} is WRONG at tiny (4/2/32) float32, lengths ")
    assert "largest error 0.0" in line
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_run_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = ["--out", str(tmp_path)]
    for arguments, said in [
        ([], "--out DIRECTORY is needed"),
        ([*out, "--interpret"], "--interpret takes weeks without --tiny"),
        (out, "no CUDA device is here"),
    ]:
        assert attention.main(arguments) == 2
        assert capsys.readouterr().err.startswith(said)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert attention.main(out) == 2
    assert capsys.readouterr().err.startswith("TRITON_INTERPRET is set")


def test_what_is_no_number_is_infinitely_wrong() -> None:
    right = torch.tensor([1.0, 3.0])
    assert exact.difference(right, right) == 0
    assert exact.difference(torch.tensor([1.0, 5.0]), right) == 0.5
    assert exact.difference(torch.tensor([1.0, float("nan")]), right) == float("inf")
