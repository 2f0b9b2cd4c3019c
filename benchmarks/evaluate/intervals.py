"""What so many samples say about a score, and about the difference of two: 95% intervals.

Both are closed forms that stay honest where all samples agree: no interval is ever empty, as a
bootstrap's is then. They are exact for scores of 0 and 1; scores between vary less than those, and
their intervals are wider than they need be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_Z = 1.959964


@dataclass(frozen=True)
class Interval:
    """A mean, and between what bounds it may be."""

    mean: float
    low: float
    high: float


def of_scores(scores: Sequence[float]) -> Interval:
    """Wilson's interval of the mean of scores 0..1; there is at least one."""
    n, mean = len(scores), sum(scores) / len(scores)
    shrink = 1 + _Z**2 / n
    centre = (mean + _Z**2 / (2 * n)) / shrink
    half = _Z / shrink * math.sqrt(mean * (1 - mean) / n + _Z**2 / (4 * n**2))
    # rounding must not put the mean outside
    return Interval(mean, min(mean, max(0.0, centre - half)), max(mean, min(1.0, centre + half)))


def of_difference(first: Sequence[float], second: Sequence[float]) -> Interval:
    """``second - first``, sample by sample, -1..1: Wald's, with half a gain and half a loss more.

    That is Agresti and Min's interval for matched pairs.
    """
    gains = [b - a for a, b in zip(first, second, strict=True)]
    n = len(gains) + 2
    up = sum(gain for gain in gains if gain > 0) + 0.5
    down = -sum(gain for gain in gains if gain < 0) + 0.5
    centre = (up - down) / n
    half = _Z * math.sqrt(up + down - (up - down) ** 2 / n) / n
    return Interval(sum(gains) / len(gains), max(-1.0, centre - half), min(1.0, centre + half))
