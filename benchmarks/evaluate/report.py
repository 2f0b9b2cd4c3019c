"""Scores of tasks at lengths under presets: as tables, as Markdown, and as rows to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from .intervals import Interval, of_difference, of_scores
from .results import Question, Result

ALL = "all"


@dataclass(frozen=True)
class Report:
    """All answers of one evaluation; every preset was asked the same samples."""

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    presets: tuple[str, ...]
    samples: int
    found: Mapping[Question, Result]

    @property
    def rows(self) -> list[tuple[str, int]]:
        """Tasks, and where there are several, all of them together, at each length."""
        together = (ALL,) if len(self.tasks) > 1 else ()
        return [(task, length) for task in (*self.tasks, *together) for length in self.lengths]

    def score(self, task: str, length: int, preset: str) -> Interval:
        return of_scores(self._scores(task, length, preset))

    def difference(self, task: str, length: int, preset: str) -> Interval:
        """To the first preset, sample by sample."""
        first = self._scores(task, length, self.presets[0])
        return of_difference(first, self._scores(task, length, preset))

    def tables(self) -> list[Table]:
        """For a terminal."""
        tables = []
        for title, head, rows in self._parts():
            table = Table(title=title)
            for index, heading in enumerate(head):
                table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
            for row in rows:
                table.add_row(*row)
            tables.append(table)
        return tables

    def markdown(self) -> str:
        """The same, for a file."""
        parts = []
        for title, head, rows in self._parts():
            lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
            table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
            parts.append(f"## {title}\n\n{table}")
        return "\n\n".join(parts)

    def metrics(self, length: int) -> dict[str, tuple[str, list[float]]]:
        """Rows of ``benchmarks/results``: scores, and the bounds of their intervals."""
        found = {}
        for task in self.tasks:
            for preset in self.presets:
                score = self.score(task, length, preset)
                for suffix, value in (("", score.mean), (".low", score.low), (".high", score.high)):
                    found[f"{task}.{preset}{suffix}"] = ("share", [value])
        return found

    def _parts(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Title, headings and rows."""
        first, *others = self.presets
        scores = [
            [task, f"{length:,}", *(_score(self.score(task, length, p)) for p in self.presets)]
            for task, length in self.rows
        ]
        parts = [("Right, % (95% interval)", ["task", "tokens", *self.presets], scores)]
        if others:
            differences = [
                [task, f"{length:,}", *(_points(self.difference(task, length, p)) for p in others)]
                for task, length in self.rows
            ]
            head = ["task", "tokens", *(f"{preset} - {first}" for preset in others)]
            parts.append(("Difference, points, same samples (95% interval)", head, differences))
        return parts

    def _scores(self, task: str, length: int, preset: str) -> list[float]:
        tasks: Sequence[str] = self.tasks if task == ALL else [task]
        return [
            self.found[Question(preset, name, length, index)].score
            for name in tasks
            for index in range(self.samples)
        ]


def document(report: Report, about: Mapping[str, Any], notes: Sequence[str], picture: str) -> str:
    """``report.md``, whole."""
    lines = "\n".join(f"- {name}: {value}" for name, value in about.items())
    said = "".join(f"{note}\n\n" for note in notes)
    return f"# Evaluation\n\n{lines}\n\n{said}![scores]({picture})\n\n{report.markdown()}\n"


def _score(found: Interval) -> str:
    mean, low, high = (100 * part for part in (found.mean, found.low, found.high))
    return f"{mean:.1f} ({low:.0f}-{high:.0f})"


def _points(found: Interval) -> str:
    mean, low, high = (100 * part for part in (found.mean, found.low, found.high))
    return f"{mean:+.1f} ({low:+.0f} to {high:+.0f})"
