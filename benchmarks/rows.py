"""Rows of benchmark results, each with where it comes from."""

from __future__ import annotations

import csv
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from hip_kernels.page_size import page_size

from hip_sglang.provenance import accelerator, cores, git_sha, processor, versions

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "date", "git_sha", "machine", "cores", "python", "torch", "triton", "sglang",
    "bench", "config", "metric", "unit", "p20", "p50", "p80",
)  # fmt: skip


def percentiles(samples: list[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    found = np.percentile(samples, [20, 50, 80])
    return float(found[0]), float(found[1]), float(found[2])


def provenance() -> dict[str, str]:
    """When, which code, and on what."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "git_sha": git_sha(RESULTS.parent.parent),
        "machine": accelerator() or processor(),
        "cores": str(cores()),
        **versions("torch", "triton", "sglang"),
    }


def save(bench: str, config: dict[str, Any], metrics: dict[str, tuple[str, list[float]]]) -> Path:
    """Append a row a metric (unit, samples) to ``results/<bench>.csv``.

    Where pages are not of 64, the configuration says so.
    """
    if page_size() != 64:
        config = {**config, "page": page_size()}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{bench}.csv"
    origin = provenance()
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if fresh:
            writer.writeheader()
        for metric, (unit, samples) in metrics.items():
            p20, p50, p80 = (f"{value:.4g}" for value in percentiles(samples))
            row = {**origin, "bench": bench, "config": json.dumps(config), "metric": metric}
            writer.writerow({**row, "unit": unit, "p20": p20, "p50": p50, "p80": p80})
    return path
