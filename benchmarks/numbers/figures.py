"""Figures of docs/, drawn from the code and from the rows."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import matplotlib
import torch
from hip_kernels.layout import Remainder
from hip_kernels.select.weigh import spread
from matplotlib.figure import Figure

from .saved import Run, page_of, runs

STYLE = {"font.family": "DejaVu Sans", "font.size": 9}
GUARDS: dict[Remainder, tuple[str, str]] = {
    "quadratic": ("0.6", "quadratic: exact for Gaussian keys"),
    "log_i0": ("tab:orange", "log_i0: exact for keys on a circle"),
    "log_cosh": ("tab:green", "log_cosh: exact for two points a channel"),
    "harmonic": ("tab:blue", "harmonic, the default"),
}
# a method each
COLORS = [*matplotlib.colormaps["tab20"].colors[::2], *matplotlib.colormaps["tab20"].colors[1::2]]
# what is exactly dense has no logarithm
LEAST = 1e-7


def draw_guards(path: Path) -> None:
    """What a spread adds to the logit of a mean: a rotary pair of deviation 1 in each channel."""
    query = torch.linspace(0, 6, 121)
    pairs = torch.stack([query, torch.zeros_like(query)], -1)[None]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 3), dpi=150, layout="constrained")
        axes = figure.subplots()
        for kind, (color, label) in GUARDS.items():
            axes.plot(query, spread(pairs, torch.ones(1, 1, 2), kind)[0, :, 0], color, label=label)
        axes.set(xlabel="query in one channel", ylabel="guard, nats", ylim=(0, 9))
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path)


def draw_methods(path: Path) -> None:
    """KL from dense against what a step reads: a panel a model and length, a line a method."""
    panels: dict[str, list[Run]] = defaultdict(list)
    for run in runs("methods"):
        config = run[0]
        # other seeds are in the tables: a line is one choice of documents
        if config["contest"] == "methods" and not config["own_prefill"] and config["seed"] == 0:
            asked = config["task"] or "texts"
            model = f"{config['model']}, pages of {page_of(config)}"
            panels[f"{asked}, {config['context']:,} tokens\n{model}"].append(run)
    # a line takes three points
    panels = {title: found for title, found in panels.items() if len(found) > 2}
    if not panels:
        return
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1 + 4 * len(panels), 4), dpi=150, layout="constrained")
        for axes, (title, found) in zip(
            figure.subplots(1, len(panels), squeeze=False, sharey=True)[0],
            panels.items(),
            strict=True,
        ):
            axes.set_prop_cycle(color=COLORS)
            for name, points in curves(found).items():
                axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=name)
            axes.set(yscale="log", xlabel="share of the KV that a step reads", title=title)
            axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
        figure.supylabel("KL from dense, nats")
        figure.savefig(path)


def curves(found: list[Run]) -> dict[str, list[tuple[float, float]]]:
    """(share read, KL) by method, a point for each share that is attended exactly."""
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for _, _, metrics in found:
        for metric, row in metrics.items():
            name, _, of = metric.rpartition(".kl.")
            if of == "mean" and name != "dense":
                read = float(metrics[f"{name}.read.mean"]["p50"])
                points[name].append((read, max(LEAST, float(row["p50"]))))
    return points
