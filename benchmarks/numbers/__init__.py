"""docs/numbers.md, and the table of the README, from the rows in ``benchmarks/results``."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from .lanes import cluster_section, demo_table, demo_words, soak_table
from .quality import (
    choice_block,
    eval_section,
    fidelity_section,
    found_block,
    methods_block,
    methods_section,
    overview_block,
    quality_words,
    synthetic_block,
    trained_section,
    tuning_section,
)
from .speed import (
    attention_table,
    attention_words,
    gpu_section,
    growth_section,
    offload_section,
    prefix_section,
    serve_section,
)

# tokens of synthetic contexts: without nodes, and with
LENGTH, FAR = 32768, 262144
ROOT = Path(__file__).resolve().parent.parent.parent
# what stands between is written from the rows
BLOCK = re.compile(
    r"(<!-- numbers: (?P<name>\w+), written by `make numbers` -->\n).*?(<!-- end of numbers -->)",
    re.DOTALL,
)
BLOCKS: dict[str, Callable[[], list[str]]] = {
    "demo": lambda: [demo_words(), demo_table(), attention_words(), quality_words()],
    "remainder": lambda: synthetic_block(LENGTH),
    "beam": lambda: synthetic_block(FAR),
    "choice": choice_block,
    "overview": overview_block,
    "found": found_block,
    "ablation": lambda: methods_block("ablation"),
}
WITH_BLOCKS = ("README.md", "docs/algorithm.md")


def stale() -> dict[Path, str]:
    """The files whose numbers are not those of the rows, and what they should be."""
    wanted = {ROOT / "docs" / "numbers.md": numbers()}
    for name in WITH_BLOCKS:
        text = (ROOT / name).read_text(encoding="utf-8")
        wanted[ROOT / name] = BLOCK.sub(_written, text)
    return {path: text for path, text in wanted.items() if path.read_text(encoding="utf-8") != text}


def _written(block: re.Match[str]) -> str:
    parts = BLOCKS[block["name"]]()
    return block[1] + "".join(f"\n{part}\n" for part in [*parts, block[3]]).removesuffix("\n")


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
            *trained_section(),
            *methods_section(),
            *tuning_section(),
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
