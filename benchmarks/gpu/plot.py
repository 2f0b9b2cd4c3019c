"""A picture of the rows: decode steps and prefill chunks against dense, by context."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

STYLES = {
    ("total", "cached"): "o-",
    ("total", "refresh"): "s-",
    ("total", "prefill"): "o-",
    ("keep_all", "decode"): "x--",
    ("keep_all", "prefill"): "x--",
}


def draw(rows: list[dict[str, Any]], device: str, path: Path, say: Callable[[str], None]) -> None:
    """Batch 1 of the first model, and its largest chunk."""
    try:
        import matplotlib
    except ImportError:
        say("no picture: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    decodes = [row for row in rows if row["chunk"] == 1 and row["batch"] == 1]
    chunks = [row for row in rows if row["chunk"] > 1]
    largest = max((row["chunk"] for row in chunks), default=0)
    panels = [decodes, [row for row in chunks if row["chunk"] == largest]]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for axis, panel, name in zip(axes, panels, ("decode", f"prefill, {largest:,}"), strict=True):
        own = [row for row in panel if row["model"] == panel[0]["model"]]
        axis.set_title(f"{own[0]['model']}, {name}" if own else f"{name}: no rows")
        for what, step in dict.fromkeys((row["what"], row["step"]) for row in own):
            style = STYLES.get((what, step), "^:")
            if what not in ("select", "attend", "summarize"):
                line = sorted(
                    (row["context"], float(row["p50_us"]))
                    for row in own
                    if (row["what"], row["step"]) == (what, step)
                )
                axis.loglog(*zip(*line, strict=True), style, label=f"{what}, {step}")
        axis.set_xlabel("tokens of context")
        axis.set_ylabel("microseconds a layer (p50)")
        axis.grid(alpha=0.3)
        if own:
            axis.legend(fontsize=8)
    figure.suptitle(device)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    say(f"drawn: {path.name}")
