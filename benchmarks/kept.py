"""What other methods attend to, as masks: for judging them on the same documents as ours.

Each is written from its paper, for decode steps, and drops what it does not keep. All have sink and
window beside what they choose, and choose for the heads of a KV group together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from hip_sglang.tune.teacher import LayerKV

# tokens of a page, where the method has pages
PAGE = 16


@dataclass(frozen=True)
class Sizes:
    """Tokens that are attended exactly, however they are found."""

    sink: int
    window: int  # the query's own among them
    budget: int


@dataclass(frozen=True)
class Search:
    """One KV head's keys, and the steps that look for something there."""

    query: Tensor  # [S, G, D], scaled
    key: Tensor  # [T, D]
    free: Tensor  # [S, T] tokens between sink and window
    budget: int

    @property
    def logits(self) -> Tensor:
        """[S, T]: of the heads together, for HiP's kind of choice."""
        return (self.query @ self.key.T).amax(1)

    def best(self, score: Tensor, size: int = 1) -> Tensor:
        """Of score [S, T / size], the best pages of ``size`` tokens, as a mask of tokens [S, T]."""
        tokens = self.free.shape[1]
        usable = pages_of(self.free, size, False).any(-1)
        score = score.masked_fill(~usable, -math.inf)
        count = min(self.budget // size, score.shape[1])
        chosen = torch.zeros_like(usable).scatter_(1, score.topk(count).indices, True)
        return (chosen & usable).repeat_interleave(size, 1)[:, :tokens] & self.free


def pages_of(x: Tensor, size: int, fill: float) -> Tensor:
    """[..., T] -> [..., pages, size], the last one filled up."""
    return pad(x, (0, -x.shape[-1] % size), value=fill).unflatten(-1, (-1, size))


def oracle(search: Search) -> Tensor:
    """The truly best tokens: by their weight in the softmax, that of the head where it is most."""
    logits = (search.query @ search.key.T).masked_fill(~search.free[:, None], -math.inf)
    return search.best((logits - logits.logsumexp(-1, keepdim=True)).amax(1))


def stream(search: Search) -> Tensor:
    """Sink and window alone (StreamingLLM, arXiv 2309.17453)."""
    return torch.zeros_like(search.free)


def mean_keys(search: Search) -> Tensor:
    """Pages by the logit of their mean key."""
    key = pages_of(search.key.T, PAGE, 0.0).mean(-1).T
    return search.best((search.query @ key.T).amax(1), PAGE)


def quest(search: Search) -> Tensor:
    """Pages by an upper bound of their logits (Quest, arXiv 2406.10774, equation 2)."""
    low = pages_of(search.key.T, PAGE, math.inf).amin(-1)  # [D, pages]
    high = pages_of(search.key.T, PAGE, -math.inf).amax(-1)
    bound = search.query.clamp_min(0) @ high + search.query.clamp_max(0) @ low
    return search.best(bound.amax(1), PAGE)


def three_stages(search: Search) -> Tensor:
    """InfiniteHiP's modular pruning (arXiv 2502.08910, section 4, algorithms 1 to 3).

    Chunks of 256, 32 and 8 tokens. In each a token is found that stands for it, by halving: the
    half whose first token has the larger logit goes on. The best chunks are cut for the next stage.
    Paper: 32K and 8K tokens after the first two stages; here sixteen and four times the budget.
    """
    logits, kept = search.logits, search.free
    for chunk, keep in ((256, 16), (32, 4), (8, 1)):
        score = representative(logits.masked_fill(~kept, -math.inf), chunk)
        kept = replace(search, free=kept, budget=keep * search.budget).best(score, chunk)
    return kept


def representative(logits: Tensor, chunk: int) -> Tensor:
    """logits [S, T] -> [S, T / chunk]: of the token that halving ends at."""
    half = pages_of(logits, chunk, -math.inf)
    while half.shape[-1] > 1:
        left, right = half.chunk(2, -1)
        better = right[..., :1] > left[..., :1]
        half = right.where(better, left)
    return half.squeeze(-1)


@dataclass(frozen=True)
class Method:
    """How tokens are chosen, and what that takes."""

    choose: Callable[[Search], Tensor]
    # of (tokens, budget): keys that a step reads, or vectors as large
    looks_at: Callable[[float, float], float]


def looks_at_stages(tokens: float, budget: float) -> float:
    """A key for each half of each halving, of as many tokens as each stage has."""
    stages = ((256, tokens), (32, 16 * budget), (8, 4 * budget))
    return sum(min(of, tokens) / chunk * (1 + math.log2(chunk)) for chunk, of in stages)


class Kept:
    """``Attention`` of a ``Teacher`` to what a method keeps; prompts are read densely."""

    def __init__(self, method: Method, sizes: Sizes) -> None:
        self.method, self.sizes = method, sizes
        self._shares: list[float] = []

    @property
    def share_read(self) -> float:
        """Of the KV, in bytes, by decode steps so far: mean over layers and steps."""
        return sum(self._shares) / max(1, len(self._shares))

    def prompt(self, layer: int, query: Tensor, stored: LayerKV, first: int) -> Tensor:
        raise NotImplementedError("documents are read densely")

    def steps(self, layer: int, query: Tensor, stored: LayerKV, first: int) -> Tensor:
        count, heads = query.shape[:2]
        tokens = first + count
        key, value = (x[:tokens].transpose(0, 1) for x in (stored.kv.key, stored.kv.value))
        own = torch.arange(first, tokens)[:, None]
        at = torch.arange(tokens)
        seen = at <= own
        fixed = seen & ((at < self.sizes.sink) | (at > own - self.sizes.window))
        out = query.new_empty(count, heads, value.shape[2])
        group = heads // len(key)
        looked = self.method.looks_at(tokens, self.sizes.budget)
        for head in range(len(key)):
            rows = slice(head * group, (head + 1) * group)
            q = query[:, rows] * query.shape[2] ** -0.5
            search = Search(q, key[head], seen & ~fixed, self.sizes.budget)
            kept = fixed | self.method.choose(search)
            logits = (q @ key[head].T).masked_fill(~kept[:, None], -math.inf)
            out[:, rows] = logits.softmax(-1) @ value[head]
            # keys are half of the KV
            self._shares.append(min(1.0, (float(kept.sum()) / count + looked / 2) / tokens))
        return out


METHODS: dict[str, Method] = {
    "oracle": Method(oracle, lambda tokens, budget: tokens),
    "stream": Method(stream, lambda tokens, budget: 0),
    "mean keys": Method(mean_keys, lambda tokens, budget: tokens / PAGE),
    "Quest": Method(quest, lambda tokens, budget: 2 * tokens / PAGE),
    "InfiniteHiP": Method(three_stages, looks_at_stages),
}
