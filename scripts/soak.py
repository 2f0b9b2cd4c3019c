"""Runs the slow lane and appends its report row to benchmarks/results/soak.csv."""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from pathlib import Path

from hip_sglang.provenance import cores, git_sha, processor, versions

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "benchmarks" / "results" / "soak.csv"


def main(arguments: list[str]) -> int:
    """Run ``pytest -m soak`` with more arguments; pytest's exit code is ours."""
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-m", "soak", f"--junitxml={results}"]
        started = time.monotonic()
        code = subprocess.run([*command, *arguments], cwd=ROOT, check=False).returncode
        seconds = time.monotonic() - started
        # 0 and 1: the tests ran; anything else is a run that says nothing about them
        if code in (0, 1):
            append(REPORT, row(results, seconds, arguments))
            print(f"soak: a row was added to {REPORT.relative_to(ROOT)}; commit it")
    return code


def row(results: Path, seconds: float, arguments: list[str]) -> dict[str, str]:
    """What was run, on what, and how it went."""
    suite = next(ElementTree.parse(results).getroot().iter("testsuite"))
    count = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "git_sha": git_sha(ROOT),
        "cpu": processor(),
        "cores": str(cores()),
        **versions("torch", "sglang"),
        "passed": str(count["tests"] - failed - count["skipped"]),
        "failed": str(failed),
        "skipped": str(count["skipped"]),
        "wall_s": f"{seconds:.1f}",
        "part": " ".join(arguments) or "all",
    }


def append(report: Path, values: dict[str, str]) -> None:
    """Add one row; the first one writes the header."""
    report.parent.mkdir(parents=True, exist_ok=True)
    new = not report.exists()
    with report.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(values), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(values)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
