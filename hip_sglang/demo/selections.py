"""Which pages the decode steps of a server attended, read from its trace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DecodeStep:
    """What one layer attended exactly in one decode step. Pages are positions in the request."""

    layer: int
    position: int
    visible_pages: int  # complete pages before the page that the token stands in
    sink_pages: int
    window_pages: int
    chosen: tuple[frozenset[int], ...]  # per KV head
    held: tuple[frozenset[int], ...]  # of these, what the device held before; per KV head
    share_read: float  # of the KV, with the summaries and the second look


def read_trace(path: Path) -> dict[str, list[DecodeStep]]:
    """The sparse decode steps of each request, by its id; empty where nothing was pruned."""
    steps: dict[str, list[DecodeStep]] = {}
    if not path.exists():
        return steps
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        step = DecodeStep(
            layer=record["layer"],
            position=record["position"],
            visible_pages=record["visible_pages"],
            sink_pages=record["sink_pages"],
            window_pages=record["window_pages"],
            chosen=tuple(frozenset(pages) for pages in record["chosen"]),
            held=tuple(frozenset(pages) for pages in record["held"]),
            share_read=record["kv_read_share"],
        )
        steps.setdefault(record["rid"], []).append(step)
    return steps


def share_held(steps: Sequence[DecodeStep]) -> float:
    """Of the pages that the steps chose, the share that the device held already."""
    chosen = sum(len(pages) for step in steps for pages in step.chosen)
    held = sum(len(pages) for step in steps for pages in step.held)
    return held / chosen if chosen else 1.0


def mean_share_read(steps: Sequence[DecodeStep]) -> float:
    """The mean over steps and layers; 1 where nothing was pruned."""
    return sum(step.share_read for step in steps) / len(steps) if steps else 1.0
