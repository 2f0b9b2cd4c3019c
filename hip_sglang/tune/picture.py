"""The picture of a search: what is read against how far it is from dense."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hip_sglang.tune.search import Trial

# what is exactly dense has no logarithm
LEAST = 1e-7


def draw(
    path: Path,
    tried: Sequence[Trial],
    long: Sequence[Trial],
    tuned: Sequence[Trial],
    presets: Sequence[Trial],
) -> None:
    """Write a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for trials, name, color, size in (
        (tried, "tried, short", "0.8", 8),
        (long, "the best, long", "tab:cyan", 14),
        (tuned, "the Pareto set, unseen text", "tab:blue", 28),
    ):
        axes.scatter(*_points(trials), label=name, color=color, s=size)
    for trial in presets:
        (share,), (apart,) = _points([trial])
        axes.scatter([share], [apart], marker="x", color="tab:red")
        axes.annotate(f" {trial.genes['preset']}", (share, apart), color="tab:red")
    axes.set(yscale="log", xlabel="share of the KV that a step reads", ylabel="KL from dense, nats")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def _points(trials: Sequence[Trial]) -> tuple[list[float], list[float]]:
    return (
        [trial.values[1] for trial in trials],
        [max(LEAST, trial.values[0]) for trial in trials],
    )
