"""docs/numbers.md, and the table of the README, from the rows in ``benchmarks/results``."""

from __future__ import annotations

from pathlib import Path

from .lanes import cluster_section, demo_table, demo_words, soak_table
from .quality import eval_section, fidelity_section, methods_section
from .speed import (
    attention_table,
    attention_words,
    gpu_section,
    growth_section,
    offload_section,
    prefix_section,
    serve_section,
)

ROOT = Path(__file__).resolve().parent.parent.parent
BEGIN, END = "<!-- numbers: written by `make numbers` -->\n", "<!-- end of numbers -->"


def stale() -> dict[Path, str]:
    """The files whose numbers are not those of the rows, and what they should be."""
    readme = ROOT / "README.md"
    wanted = {
        ROOT / "docs" / "numbers.md": numbers(),
        readme: with_table(readme.read_text(encoding="utf-8")),
    }
    return {path: text for path, text in wanted.items() if path.read_text(encoding="utf-8") != text}


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
            *gpu_section(),
            *growth_section(),
            *serve_section(),
            *offload_section(),
            *prefix_section(),
            *fidelity_section(),
            *methods_section(),
            *eval_section(),
            *cluster_section(),
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
