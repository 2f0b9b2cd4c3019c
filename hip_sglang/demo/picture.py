"""A picture of where the model looked: one row per quote, the document from left to right."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from hip_kernels.layout import PAGE_SIZE
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from hip_sglang.demo.report import RunResult
from hip_sglang.demo.selections import DecodeStep

_SINK_AND_WINDOW = "#9aa5b1"
_HEADS = ("#1f77b4", "#e07b00", "#2ca02c", "#9467bd")
_TARGET = "#c1121f"
_PAPER = "#f4f1ea"
_FETCHED = "#111111"


def draw_selections(path: Path, run: RunResult, trace: Mapping[str, Sequence[DecodeStep]]) -> None:
    """Write a PNG of the pages that the last layer attended while it answered each quote.

    A lane per KV head shows the pages that it chose: the more of the answer's decode steps chose a
    page, the stronger its color. Where KV is offloaded, a mark below a page says that some step
    had to fetch it.
    """
    answers, pages = run.answers, -(-run.document_tokens // PAGE_SIZE)
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 10}):
        figure = Figure(figsize=(13, 1.9 + 0.5 * len(answers)), dpi=150, layout="constrained")
        axes = figure.subplots()
        heads = 1
        for row, answer in enumerate(answers):
            steps = trace.get(answer.request_id, [])
            last_layer = max((step.layer for step in steps), default=0)
            steps = [step for step in steps if step.layer == last_layer]
            heads = max([heads, *(len(step.chosen) for step in steps)])
            axes.barh(row, pages, height=0.8, left=0, color=_PAPER, zorder=0)
            _draw_row(axes, row, steps, pages)
            target = answer.quote.target / PAGE_SIZE
            axes.plot(target, row - 0.49, marker="v", color=_TARGET, markersize=7, zorder=5)
            axes.text(
                1.008,
                row,
                "right" if answer.correct else "WRONG",
                transform=axes.get_yaxis_transform(),
                va="center",
                color="#2d6a4f" if answer.correct else _TARGET,
                weight="normal" if answer.correct else "bold",
            )
        axes.set_yticks(range(len(answers)), [f"{a.quote.depth:.0%}" for a in answers])
        axes.set_ylim(len(answers) - 0.4, -0.75)
        axes.set_xlim(0, pages)
        ticks = np.linspace(0, pages, 9)
        axes.set_xticks(ticks, [f"{tick * PAGE_SIZE / 1024:.0f}K" for tick in ticks])
        axes.set_xlabel(
            f"position in the document (tokens); "
            f"a page of {PAGE_SIZE} is the stronger, the more decode steps chose it"
        )
        axes.set_ylabel("where the quote was taken from")
        axes.set_title(_title(run, trace), loc="left", weight="bold", fontsize=12, pad=30)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        axes.legend(
            handles=_legend(heads, run.residency is not None),
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
            ncols=heads + 3,
            frameon=False,
            borderaxespad=0.3,
            handlelength=1.2,
        )
        figure.savefig(path)


def _draw_row(
    axes: matplotlib.axes.Axes, row: int, steps: Sequence[DecodeStep], pages: int
) -> None:
    """Sink and window over the whole height, the chosen pages in a lane per KV head."""
    if not steps:
        axes.barh(row, pages, height=0.8, left=0, color=_SINK_AND_WINDOW, zorder=1)
        return
    final = steps[-1]
    window = final.visible_pages - final.window_pages
    for left, right in ((0, final.sink_pages), (window, pages)):
        axes.barh(row, right - left, height=0.8, left=left, color=_SINK_AND_WINDOW, zorder=2)
    # a page of a long document is thinner than a pixel
    width = max(1.0, pages / 700)
    lane = 0.8 / len(final.chosen)
    for head in range(len(final.chosen)):
        times = Counter(page for step in steps for page in step.chosen[head])
        chosen = np.array(sorted(times, key=times.__getitem__), dtype=float)
        often = np.array([times[int(page)] for page in chosen]) / len(steps)
        axes.barh(
            np.full(len(chosen), row - 0.4 + lane * (head + 0.5)),
            width,
            height=lane * 0.92,
            left=chosen + 0.5 - width / 2,
            color=[to_rgba(_HEADS[head % len(_HEADS)], 0.15 + 0.85 * share) for share in often],
            zorder=3,
        )
        fetched = sorted({page for step in steps for page in step.chosen[head] - step.held[head]})
        axes.plot(
            np.array(fetched, dtype=float) + 0.5,
            np.full(len(fetched), row - 0.4 + lane * (head + 0.93)),
            marker="|",
            markersize=3,
            linestyle="none",
            color=_FETCHED,
            zorder=4,
        )


def _title(run: RunResult, trace: Mapping[str, Sequence[DecodeStep]]) -> str:
    title = f"{run.right} of {len(run.answers)} quotes continued"
    asked = [step for answer in run.answers for step in trace.get(answer.request_id, [])]
    if not asked:
        return f"{title}; every page was attended"
    title += f", reading {run.kv_read_share:.1%} of the KV at each step"
    if run.residency is not None:
        share = run.residency.device_tokens / run.document_tokens
        title += f"; the device holds {share:.0%} of it"
    return title


def _legend(heads: int, offloaded: bool) -> list[Patch | Line2D]:
    colors = zip(range(heads), itertools.cycle(_HEADS))
    answer = Line2D(
        [], [], marker="v", linestyle="none", color=_TARGET, markersize=7, label="the answer"
    )
    fetched = Line2D(
        [], [], marker="|", linestyle="none", color=_FETCHED, label="fetched from host memory"
    )
    return [
        *(Patch(color=color, label=f"chosen by KV head {head}") for head, color in colors),
        Patch(color=_SINK_AND_WINDOW, label="sink and window"),
        *([fetched] if offloaded else []),
        answer,
    ]
