"""A picture of the scores: a panel a task, a line a preset."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from .report import Report

_COLORS = ("#111111", "#c1121f", "#1f77b4", "#2ca02c", "#9467bd")
_COLUMNS = 4


def draw(path: Path, report: Report) -> None:
    """Write a PNG: score by length, with 95% intervals."""
    names = list(dict.fromkeys(task for task, _ in report.rows))
    columns = min(_COLUMNS, len(names))
    lines = -(-len(names) // columns)
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(1 + 3 * columns, 0.8 + 2.4 * lines), dpi=150, layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
        for axes, name in zip(panels, names, strict=False):
            for number, preset in enumerate(report.presets):
                scores = [report.score(name, length, preset) for length in report.lengths]
                # side by side, as what is right lies on one line
                shift = 1 + 0.03 * (number - (len(report.presets) - 1) / 2)
                axes.errorbar(
                    [length * shift for length in report.lengths],
                    [score.mean for score in scores],
                    yerr=[
                        [score.mean - score.low for score in scores],
                        [score.high - score.mean for score in scores],
                    ],
                    color=_COLORS[number % len(_COLORS)],
                    marker="o",
                    markersize=4,
                    capsize=2,
                    label=preset,
                )
            axes.set_title(name, loc="left", weight="bold")
            axes.set_xscale("log", base=2)
            axes.set_xticks(report.lengths, [f"{n / 1024:.3g}K" for n in report.lengths])
            axes.minorticks_off()
            axes.set_ylim(-0.04, 1.04)
            axes.spines[["top", "right"]].set_visible(False)
        for axes in panels[len(names) :]:
            axes.set_visible(False)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)
        figure.supxlabel("tokens")
        figure.supylabel("right")
        figure.savefig(path)
