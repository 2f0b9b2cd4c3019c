"""Writes docs/numbers.md, and the table of the README, from the rows in benchmarks/results/."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- numbers: written by `make numbers` -->\n", "<!-- end of numbers -->"


def main() -> int:
    """Rewrite both files."""
    (ROOT / "docs" / "numbers.md").write_text(numbers(), encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


def numbers() -> str:
    """docs/numbers.md, whole."""
    return "\n\n".join(
        [
            "# Numbers",
            "Written by `make numbers` from `benchmarks/results/`. A time says what that machine "
            "did that day; a ratio compares what ran in turn, round by round, in one run.",
            "## One layer's attention",
            "`hip-sglang bench attention`, float32, the default configuration. A context's keys "
            "are random and drift. *Dense* is the better of two dense attentions over contiguous "
            "memory; *keep-all* is our own code with nothing pruned.",
            attention_table(),
            "## The demo",
            demo_words(),
            demo_table(),
            "## The slow lane",
            "`make soak`.",
            soak_table(),
        ]
    ) + ("\n")


def with_table(readme: str) -> str:
    """The README with its table as the results have it."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return (
        f"{before}{BEGIN}\n{demo_words()}\n\n{demo_table()}\n\n{attention_words()}\n\n{END}{after}"
    )


def attention_rows() -> list[tuple[dict[str, Any], dict[str, str], dict[str, dict[str, str]]]]:
    """(configuration, where it comes from, its rows by metric), the newest of each."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    with (RESULTS / "attention.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            key = row["machine"] + row["config"]
            if row["metric"] in found.get(key, {}):
                found[key] = {}  # a newer run of the same
            found.setdefault(key, {})[row["metric"]] = row
    return [
        (json.loads(row["config"]), row, metrics)
        for metrics in found.values()
        for row in [next(iter(metrics.values()))]
    ]


def attention_table() -> str:
    def cell(metrics: dict[str, dict[str, str]], name: str) -> str:
        if name not in metrics:
            return "-"
        low, middle, high = (float(metrics[name][p]) for p in ("p20", "p50", "p80"))
        if name.startswith("ratio"):
            return f"**{middle:.1f}x** ({low:.1f}-{high:.1f})"
        return f"{1e3 * middle:,.1f} ms"

    rows = [
        [
            f"{config['mode']}, {config['rows']:,} of {config['context']:,}",
            f"{config['heads']}, {config['dim']}",
            *(cell(metrics, name) for name in ("ours", "ratio.vs_best_dense")),
            *(cell(metrics, f"ratio.vs_{name}") for name in ("keep_all", "torch_native")),
            f"{row['machine']}, {row['cores']} cores; {row['date']}, {row['git_sha']}",
        ]
        for config, row, metrics in attention_rows()
    ]
    head = ["rows of context", "heads, dim", "ours", "dense / ours", "keep-all / ours"]
    return table([*head, "torch_native / ours", "where"], rows)


def attention_words() -> str:
    """The README's sentence."""
    for config, _, metrics in attention_rows():
        if (config["mode"], config["context"]) == ("decode", 131072):
            dense, native = (
                float(metrics[f"ratio.vs_{name}"]["p50"]) for name in ("best_dense", "torch_native")
            )
            return (
                f"One layer's attention in a decode step over {config['context']:,} tokens "
                f"({config['heads']} heads of {config['dim']}, float32, same machine): "
                f"**{dense:.1f}x** as fast as the best dense attention over contiguous memory, "
                f"**{native:.0f}x** SGLang's `torch_native`. More in "
                "[docs/numbers.md](docs/numbers.md)."
            )
    raise ValueError("no decode row at 131072 in attention.csv; hip-sglang bench attention --save")


def demo() -> dict[str, Any]:
    report: dict[str, Any] = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    return report


def demo_words() -> str:
    machine = demo()["provenance"]["machine"]
    return (
        f"`make demo` on {machine['cores']} cores of an {machine['processor']}"
        f"{', no GPU' if machine['accelerator'] is None else ''}; one request alone:"
    )


def demo_table() -> str:
    rows = [
        [
            run["name"],
            f"{run['context'] // 1024}K",
            f"{run['quotes_right']} of {run['quotes']}",
            f"{run['ttft_s']:.0f} s",
            f"{run['decode_tokens_per_s']:.1f}",
            f"{run['kv_read_share']:.1%}",
        ]
        for run in demo()["runs"]
    ]
    head = ["attention", "context", "quotes right", "first token", "tokens/s", "KV read a step"]
    return table(head, rows)


def soak_table() -> str:
    with (RESULTS / "soak.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return table(list(rows[0]), [list(row.values()) for row in rows])


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
