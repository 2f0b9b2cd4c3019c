"""Synthetic contexts of one head, for judging the remainder against an oracle's best tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hip_kernels.layout import PAGE_SIZE, SparsePlan
from scipy.signal import lfilter
from torch import Tensor

from tests.kernels.brute import Request, run

LENGTH, WIDTH, TOPIC = 32768, 128, 512
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
        kept = torch.zeros(LENGTH, dtype=torch.bool)
        kept[: plan.sink_pages * PAGE_SIZE] = True
        kept[-(plan.window_pages + 1) * PAGE_SIZE :] = True
        best = scores.masked_fill(kept, -math.inf).topk(plan.budget_pages * PAGE_SIZE).indices
        kept[best] = True
        return scores.masked_fill(~kept, -math.inf).softmax(0) @ self.value

    def ours(self, plan: SparsePlan) -> Tensor:
        """What the kernels make of it, in a decode step."""
        request = Request(self.key[:, None], self.value[:, None], prefix=LENGTH - 1)
        query = self.query[None, None]
        return run([request], query, plan, sparse_from=0, sparse_decode_from=0)[0, 0]

    def error(self, output: Tensor) -> float:
        """Relative L2 distance from dense."""
        dense = self.dense()
        return float((output - dense).norm() / dense.norm())


def drifting(
    random: torch.Generator, rho: float, needle: int, strength: float, topic: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values, topics and the direction that the query seeks; no rope yet.

    Keys drift (an AR(1) of ``rho``) about topics of 512 tokens; three needles of some tokens.
    """
    noise = torch.randn(LENGTH, WIDTH, generator=random)
    drift = torch.from_numpy(lfilter([math.sqrt(1 - rho**2)], [1, -rho], noise.numpy(), axis=0))
    topics = torch.randn(LENGTH // TOPIC, WIDTH, generator=random)
    of_token = topics.repeat_interleave(TOPIC, 0)
    key = math.sqrt(1 - topic) * drift.float() + math.sqrt(topic) * of_token
    sought = torch.randn(WIDTH, generator=random)
    sought /= sought.norm()
    for place in torch.randint(300, LENGTH - 2000, (3,), generator=random).tolist():
        key[place : place + needle] += strength * sought
    mixed = of_token @ torch.randn(WIDTH, WIDTH, generator=random) * WIDTH**-0.5
    value = 0.5 * torch.randn(LENGTH, WIDTH, generator=random) + mixed
    return key, value, topics, sought


def seeking(random: torch.Generator, sought: Tensor, topics: Tensor, strength: float) -> Tensor:
    """A query for the needles, and a little for four topics."""
    four = topics[torch.randint(0, len(topics), (4,), generator=random)].sum(0)
    return strength * sought + 0.6 * four + 0.5 * torch.randn(WIDTH, generator=random)


def plain(rho: float, needle: int, strength: float) -> Callable[[int], Context]:
    """Keys without positions, and a sink."""

    def make(seed: int) -> Context:
        random = torch.Generator().manual_seed(seed)
        key, value, topics, sought = drifting(random, rho, needle, strength, 0.4)
        sink = torch.randn(WIDTH, generator=random)
        sink /= sink.norm()
        key[:4] += 14 * sink
        return Context(seeking(random, sought, topics, 11) + 3 * sink, key, value)

    return make


def rotated(rho: float, needle: int, outlier: float = 0) -> Callable[[int], Context]:
    """Keys under RoPE; six channels may carry a large constant before it."""

    def make(seed: int) -> Context:
        random = torch.Generator().manual_seed(seed)
        key, value, topics, sought = drifting(random, rho, needle, 2.2, 0.43)
        constant = torch.zeros(WIDTH)
        channels = torch.randperm(WIDTH, generator=random)[:6]
        constant[channels] = outlier * torch.randn(6, generator=random).sign()
        query = seeking(random, sought, topics, 10) + 0.5 * constant
        key = rope(key + constant, torch.arange(LENGTH))
        query = rope(query[None], torch.tensor([LENGTH - 1]))[0]
        sink = torch.randn(WIDTH, generator=random)
        sink /= sink.norm()
        key[:4] = 0.3 * key[:4] + 10 * sink
        return Context(query + 2.5 * sink, key, value)

    return make


def two_sided(seed: int) -> Context:
    """Made to break us: every fourth page is torn between two opposite keys, along the query.

    Their mean is nothing, and the deviation of each channel is small, but all channels deviate
    together: a diagonal sigma sees little of it.
    """
    random = torch.Generator().manual_seed(seed)
    key = 0.3 * torch.randn(LENGTH, WIDTH, generator=random)
    value = torch.randn(LENGTH, WIDTH, generator=random)
    sought = torch.randn(WIDTH, generator=random)
    sought /= sought.norm()
    torn = torch.arange(LENGTH) // PAGE_SIZE % 4 == 0
    sign = torch.randint(0, 2, (LENGTH,), generator=random) * 2 - 1
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
