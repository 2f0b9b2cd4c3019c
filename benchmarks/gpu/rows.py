"""Rows of results, each with where it comes from."""

from __future__ import annotations

import csv
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton

INTERPRETER = "interpreter"
COLUMNS = (
    "date", "git_sha", "device", "torch", "triton", "dtype",
    "model", "heads", "kv_heads", "width", "context", "batch", "chunk", "plan",
    "what", "step", "shared_kv", "copies", "timing", "p20_us", "p50_us", "p80_us",
    "ratio", "against", "bytes", "share_of_bandwidth",
)  # fmt: skip


def provenance(device: torch.device) -> dict[str, str]:
    """When, which code, and on what; rows of the interpreter name no other device."""
    cuda = device.type == "cuda"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "git_sha": _git_sha(Path(__file__).resolve().parents[2]),
        "device": torch.cuda.get_device_name(device) if cuda else INTERPRETER,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


class Rows:
    """A file of rows: what is written stays, should the run be cut short."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.origin = provenance(device)
        interpreter = "" if device.type == "cuda" else f".{INTERPRETER}"
        self.path = folder / f"gpu_attention{interpreter}.csv"
        self.rows: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, rows: list[dict[str, Any]]) -> None:
        fresh = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="")
            if fresh:
                writer.writeheader()
            writer.writerows({**self.origin, **row} for row in rows)
        self.rows += rows


def _git_sha(clone: Path) -> str:
    """The commit, with a + where more than results has changed since."""
    if told := os.environ.get("HIP_SGLANG_SHA"):
        return told

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", *words], cwd=clone, capture_output=True, text=True)
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")
