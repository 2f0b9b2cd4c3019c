"""Synthetic contexts of one head, for judging the remainder against an oracle's best tokens.

Each generator draws a query at the end of a context of 128 channels from a seed. The keys drift
about topics and hold needles; this is evidence about the method, not about a language model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from hip_kernels.layout import PAGE_SIZE, SparsePlan
from scipy.signal import lfilter
from torch import Tensor

LENGTH, WIDTH, TOPIC = 32768, 128, 512
# needles lie before the window
SHORTEST = 4096
THETA = 5e5


@dataclass(frozen=True)
class Context:
    """One query at the end of a context."""

    query: Tensor  # [D]
    key: Tensor  # [T, D]
    value: Tensor  # [T, D]

    def dense(self) -> Tensor:
        return self.scores().softmax(0) @ self.value

    def scores(self) -> Tensor:
        return self.key @ self.query * WIDTH**-0.5

    def oracle(self, plan: SparsePlan) -> Tensor:
        """Sink, window and the truly best tokens, as many as the budget; the rest is dropped."""
        scores = self.scores()
        kept = self.stream_mask(plan)
        budget = min(plan.budget_pages * PAGE_SIZE, int((~kept).sum()))
        kept[scores.masked_fill(kept, -math.inf).topk(budget).indices] = True
        return self.only(kept)

    def stream(self, plan: SparsePlan) -> Tensor:
        """Sink and window alone."""
        return self.only(self.stream_mask(plan))

    def stream_mask(self, plan: SparsePlan) -> Tensor:
        """[T]: which tokens lie in the sink, the window or the query's own page."""
        page = torch.arange(len(self.key)) // PAGE_SIZE
        return (page < plan.sink_pages) | (page >= page[-1] - plan.window_pages)

    def only(self, kept: Tensor) -> Tensor:
        """Attention over the tokens of kept [T]."""
        return self.scores().masked_fill(~kept, -math.inf).softmax(0) @ self.value

    def error(self, output: Tensor) -> float:
        """Relative L2 distance of output [D] from dense."""
        dense = self.dense()
        return float((output - dense).norm() / dense.norm())


class Generator(Protocol):
    """Draws a context of ``length`` tokens, whole pages, from a seed."""

    def __call__(self, seed: int, length: int = LENGTH) -> Context: ...


def drifting(
    random: torch.Generator, length: int, rho: float, needle: int, strength: float, topic: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values, topics and the direction that the query seeks; no rope yet.

    Keys drift (an AR(1) of ``rho``) about topics of 512 tokens; three needles of some tokens.
    """
    noise = torch.randn(length, WIDTH, generator=random)
    drift = torch.from_numpy(lfilter([math.sqrt(1 - rho**2)], [1, -rho], noise.numpy(), axis=0))
    topics = torch.randn(length // TOPIC, WIDTH, generator=random)
    of_token = topics.repeat_interleave(TOPIC, 0)
    key = math.sqrt(1 - topic) * drift.float() + math.sqrt(topic) * of_token
    sought = torch.randn(WIDTH, generator=random)
    sought /= sought.norm()
    for place in torch.randint(300, length - 2000, (3,), generator=random).tolist():
        key[place : place + needle] += strength * sought
    mixed = of_token @ torch.randn(WIDTH, WIDTH, generator=random) * WIDTH**-0.5
    value = 0.5 * torch.randn(length, WIDTH, generator=random) + mixed
    return key, value, topics, sought


def seeking(random: torch.Generator, sought: Tensor, topics: Tensor, strength: float) -> Tensor:
    """A query for the needles, and a little for four topics."""
    four = topics[torch.randint(0, len(topics), (4,), generator=random)].sum(0)
    return strength * sought + 0.6 * four + 0.5 * torch.randn(WIDTH, generator=random)


def plain(rho: float, needle: int, strength: float) -> Generator:
    """Keys without positions, and a sink."""

    def make(seed: int, length: int = LENGTH) -> Context:
        random = torch.Generator().manual_seed(seed)
        key, value, topics, sought = drifting(random, length, rho, needle, strength, 0.4)
        sink = torch.randn(WIDTH, generator=random)
        sink /= sink.norm()
        key[:4] += 14 * sink
        return Context(seeking(random, sought, topics, 11) + 3 * sink, key, value)

    return make


def rotated(rho: float, needle: int, outlier: float = 0) -> Generator:
    """Keys under RoPE; six channels may carry a large constant before it."""

    def make(seed: int, length: int = LENGTH) -> Context:
        random = torch.Generator().manual_seed(seed)
        key, value, topics, sought = drifting(random, length, rho, needle, 2.2, 0.43)
        constant = torch.zeros(WIDTH)
        channels = torch.randperm(WIDTH, generator=random)[:6]
        constant[channels] = outlier * torch.randn(6, generator=random).sign()
        query = seeking(random, sought, topics, 10) + 0.5 * constant
        key = rope(key + constant, torch.arange(length))
        query = rope(query[None], torch.tensor([length - 1]))[0]
        sink = torch.randn(WIDTH, generator=random)
        sink /= sink.norm()
        key[:4] = 0.3 * key[:4] + 10 * sink
        return Context(query + 2.5 * sink, key, value)

    return make


def two_sided(seed: int, length: int = LENGTH) -> Context:
    """Made to break us: every fourth page is torn between two opposite keys, along the query.

    Their mean is nothing, and the deviation of each channel is small, but all channels deviate
    together: a diagonal sigma sees little of it.
    """
    random = torch.Generator().manual_seed(seed)
    key = 0.3 * torch.randn(length, WIDTH, generator=random)
    value = torch.randn(length, WIDTH, generator=random)
    sought = torch.randn(WIDTH, generator=random)
    sought /= sought.norm()
    torn = torch.arange(length) // PAGE_SIZE % 4 == 0
    sign = torch.randint(0, 2, (length,), generator=random) * 2 - 1
    key += (torn * sign * 4)[:, None] * sought
    value += (torn & (sign > 0))[:, None] * torch.randn(WIDTH, generator=random)
    return Context(11 * sought, key, value)


def rope(x: Tensor, position: Tensor) -> Tensor:
    """x [T, D] at positions [T]; pairs are the halves, as in Llama."""
    half = WIDTH // 2
    frequency = THETA ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = position.double()[:, None] * frequency
    cos, sin = angle.cos().float(), angle.sin().float()
    left, right = x[:, :half], x[:, half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


GENERATORS: dict[str, Generator] = {
    "smooth": plain(0.97, 16, 1.6),
    "mid": plain(0.8, 8, 2.0),
    "rough": plain(0.3, 1, 2.6),
    "rope_smooth": rotated(0.97, 16),
    "rope_mid": rotated(0.8, 8),
    "rope_rough": rotated(0.3, 1),
    "outliers_4": rotated(0.8, 8, outlier=4),
    "outliers_10": rotated(0.8, 8, outlier=10),
    "torn": two_sided,
}
