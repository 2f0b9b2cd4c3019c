"""Rows that benchmarks saved, and how a table shows them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from .. import rows

TRAINED = Path(rows.__file__).parent / "trained"

# a run: its configuration, where it comes from, and its rows by metric
Run = tuple[dict[str, Any], dict[str, str], dict[str, dict[str, str]]]


def file_of(name: str) -> Path:
    """One of the results."""
    return rows.RESULTS / name


def runs(bench: str) -> list[Run]:
    """The newest run of each configuration on each machine; none where there are no rows yet.

    What it did not measure is left out, or of an older one where it repeats nothing of that.
    """
    path = file_of(f"{bench}.csv")
    if not path.exists():
        return []
    found: dict[str, dict[str, dict[str, str]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            key = row["machine"] + row["config"]
            if row["metric"] in found.get(key, {}):
                # a newer run of the same, which may have begun with what the older one lacked
                found[key] = {
                    metric: known
                    for metric, known in found[key].items()
                    if known["git_sha"] == row["git_sha"]
                }
            found.setdefault(key, {})[row["metric"]] = row
    return [
        (json.loads(row["config"]), row, metrics)
        for metrics in found.values()
        for row in [next(iter(metrics.values()))]
    ]


def where(row: dict[str, str]) -> str:
    return f"{row['machine']}, {row['cores']} cores; {row['date']}, {row['git_sha']}"


def page_of(config: dict[str, Any]) -> int:
    """Tokens of a page."""
    return int(config.get("page", 64))


def ratio(row: dict[str, str]) -> str:
    low, middle, high = (float(row[p]) for p in ("p20", "p50", "p80"))
    return f"**{middle:.1f}x** ({low:.1f}-{high:.1f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
