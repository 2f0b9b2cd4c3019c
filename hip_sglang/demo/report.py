"""What the demo found: measurements of each server, as a table and as JSON."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from hip_sglang.demo.program import Answer, Speed
from hip_sglang.provenance import accelerator, cores, memory_gib, processor, versions


@dataclass(frozen=True)
class Residency:
    """What of offloaded KV the device held."""

    device_tokens: int
    held_share: float  # of the pages that decode steps chose, before they were fetched

    def sentence(self, tokens: int) -> str:
        return (
            f"the device held {self.device_tokens:,} of {tokens:,} tokens of KV, and "
            f"{self.held_share:.0%} of the pages that decode steps chose were among them"
        )


@dataclass(frozen=True)
class RunResult:
    """One server, one document, all quotes."""

    name: str
    context: int
    document_tokens: int
    boot_s: float
    speed: Speed
    answers: tuple[Answer, ...]
    kv_read_share: float = 1.0  # in a decode step, summaries included
    residency: Residency | None = None  # where KV was offloaded

    @property
    def right(self) -> int:
        return sum(answer.correct for answer in self.answers)

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "context": self.context,
            "document_tokens": self.document_tokens,
            "boot_s": round(self.boot_s, 1),
            "ttft_s": round(self.speed.ttft_s, 3),
            "decode_tokens_per_s": round(self.speed.decode_tokens_per_s, 2),
            "kv_read_share": round(self.kv_read_share, 4),
            "quotes_right": self.right,
            "quotes": len(self.answers),
            "residency": None if self.residency is None else asdict(self.residency),
        }


@dataclass(frozen=True)
class DemoReport:
    """The first run is the one that is shown off; the others stand beside it."""

    source: str
    runs: tuple[RunResult, ...]
    # what keep-all answered to the quotes that HiP got wrong, on the same document
    second_opinions: tuple[Answer, ...]

    @property
    def lost(self) -> int:
        """How many quotes HiP got wrong and keep-all right."""
        return sum(answer.correct for answer in self.second_opinions)

    def as_json(self) -> dict[str, Any]:
        keep_all = {answer.quote: answer.correct for answer in self.second_opinions}
        return {
            "document": self.source,
            "quotes": [
                {
                    "depth": round(answer.quote.depth, 4),
                    "correct": answer.correct,
                    "expected": answer.quote.expected,
                    "got": answer.got,
                    "quote": answer.quote.suffix[1:],
                    "position": answer.quote.target,
                    # null where nobody had to ask
                    "keep_all_correct": keep_all.get(answer.quote),
                }
                for answer in self.runs[0].answers
            ],
            "runs": [run.as_json() for run in self.runs],
            "provenance": provenance(),
        }

    def tables(self) -> list[Table]:
        return [_quotes_table(self.runs), _speed_table(self.runs)]


def provenance() -> dict[str, Any]:
    """The versions and the machine that the numbers belong to."""
    return {
        "versions": versions("hip-sglang", "sglang", "torch", "transformers"),
        "machine": {
            "platform": platform.platform(),
            "processor": processor(),
            "cores": cores(),
            "memory_gib": round(memory_gib(), 1),
            "accelerator": accelerator(),
        },
    }


def _quotes_table(runs: Sequence[RunResult]) -> Table:
    table = Table(title="quotes continued word by word, from depth", show_footer=True)
    table.add_column("", footer="right")
    for run in runs:
        right = f"{run.right} of {len(run.answers)}"
        table.add_column(_label(run), footer=right, justify="right", no_wrap=True)
    for number, row in enumerate(zip(*(run.answers for run in runs), strict=True), 1):
        table.add_row(str(number), *map(_mark, row))
    return table


def _mark(answer: Answer) -> str:
    mark = "[green]✓[/]" if answer.correct else "[red]✗[/]"
    return f"{answer.quote.depth:.0%} {mark}"


def _speed_table(runs: Sequence[RunResult]) -> Table:
    table = Table(title="one request alone (the contexts differ)")
    table.add_column("", no_wrap=True)
    for heading in ("tokens", "first token", "tokens/s", "KV read"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        table.add_row(
            _label(run),
            f"{run.speed.prompt_tokens:,}",
            f"{run.speed.ttft_s:.1f} s",
            f"{run.speed.decode_tokens_per_s:.1f}",
            f"{run.kv_read_share:.1%}",
        )
    return table


def _label(run: RunResult) -> str:
    return f"{run.name} {run.context / 1024:.3g}K"
