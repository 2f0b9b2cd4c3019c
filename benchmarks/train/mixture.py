"""Lessons in retrieval, and Python's library, of any length.

What a lesson counts are the tokens that its context decides: a copy's second half, the value of a
key that stood before. In the library every token counts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hip_sglang.demo.vocabulary import Tokenizer

from ..tasks.words import identifier, number, word

Ids = NDArray[np.int64]
# of each kind of lesson; a variable's chain takes two hops or more
SHARES = {
    "copy": 0.2, "recall": 0.1, "needle": 0.2, "variables": 0.05, "codes": 0.25, "text": 0.2,
}  # fmt: skip
KINDS = tuple(SHARES)
# tokens that stand for "is" and "?" among made-up ones; what follows is free
_IS, _ASKED, _FIRST = 1, 2, 3
# tokens that have room for ids of 36 characters
LONG = 512


@dataclass(frozen=True)
class Batch:
    """Sequences of one length, whose marked tokens are to be predicted."""

    ids: Tensor  # [B, T]
    counted: Tensor  # bool [B, T]
    kinds: Tensor  # [B] in KINDS


class Mixture:
    """Lessons from one seed."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str], seed: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = tokenizer.get_vocab_size()
        encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        self._text = np.concatenate([np.array(one.ids, np.int64) for one in encoded])
        self._chance = np.random.default_rng(seed)
        self._words = random.Random(seed)
        self._lessons: dict[str, Callable[[int], tuple[Ids, Ids]]] = {
            "copy": self.copy,
            "recall": self.recall,
            "needle": self.needle,
            "variables": self.variables,
            "codes": self.codes,
            "text": self.text,
        }

    def batch(self, tokens: int, sequences: int) -> Batch:
        """So many lessons, each of a kind drawn by its share."""
        kinds = self._chance.choice(len(KINDS), sequences, p=list(SHARES.values()))
        lessons = [self.lesson(KINDS[kind], tokens) for kind in kinds]
        ids, counted = (np.stack(part) for part in zip(*lessons, strict=True))
        return Batch(torch.from_numpy(ids), torch.from_numpy(counted), torch.from_numpy(kinds))

    def lesson(self, kind: str, tokens: int) -> tuple[Ids, NDArray[np.bool_]]:
        """ids [T] of one kind, and which of them count."""
        ids, places = self._lessons[kind](tokens)
        counted = np.zeros(tokens, np.bool_)
        counted[places] = True
        return ids, counted

    def copy(self, tokens: int) -> tuple[Ids, Ids]:
        """A passage of noise, and the same again after a gap."""
        size = int(self._chance.integers(tokens // 4, tokens // 2))
        passage = self._noise(size)
        again = int(self._chance.integers(size, tokens - size + 1))
        start = int(self._chance.integers(0, again - size + 1))
        ids = self._haystack(tokens)
        ids[start : start + size] = passage
        ids[again : again + size] = passage
        # what its first token is, nothing tells
        return ids, np.arange(again + 1, again + size)

    def recall(self, tokens: int) -> tuple[Ids, Ids]:
        """Pairs of one token each, then some of them again, early ones as often as late ones."""
        pairs = min(tokens // 4, (self._vocabulary - _FIRST) // 2)
        made_up = self._chance.permutation(np.arange(_FIRST, self._vocabulary))
        known = np.stack([made_up[:pairs], self._noise(pairs)], 1)
        asked = known[self._chance.integers(0, pairs, (tokens + 1) // 2 - pairs)]
        ids = np.concatenate([known, asked]).reshape(-1)[:tokens]
        return ids, np.arange(2 * pairs + 1, tokens, 2)

    def needle(self, tokens: int) -> tuple[Ids, Ids]:
        """Phrases with their values in a haystack, some of which are asked for at the end."""
        count = int(self._chance.integers(1, max(2, min(64, tokens // 32))))
        key, value = self._chance.integers(2, 9, 2).tolist()
        needles = self._noise(count * (key + value)).reshape(count, key + value)
        asked = max(1, min(count, tokens // 4 // (key + value)))
        end = needles[self._chance.permutation(count)[:asked]].reshape(-1)
        ids = self._haystack(tokens)
        room = tokens - len(end)
        # each has a part of the haystack to lie in
        part = room // count
        shifts = self._chance.integers(0, part - key - value + 1, count)
        places = part * np.arange(count) + shifts
        ids[places[:, None] + np.arange(key + value)] = needles
        ids[room:] = end
        return ids, room + np.flatnonzero(np.arange(len(end)) % (key + value) >= key)

    def variables(self, tokens: int) -> tuple[Ids, Ids]:
        """Names that are each other's, the first a value's: what is the last one's?"""
        hops = int(self._chance.integers(2, 5))
        chains = max(1, min(tokens // 64, 32))
        names = self._chance.permutation(np.arange(_FIRST, self._vocabulary))
        names = names[: chains * (hops + 2)].reshape(chains, hops + 2)
        told = [
            (place, [chain[hop + 1], _IS, chain[hop]])
            for chain in names
            for hop, place in enumerate(sorted(self._chance.random(hops + 1)))
        ]
        lines = np.array([line for _, line in sorted(told, key=lambda one: one[0])], np.int64)
        end = np.concatenate([[chain[-1], _ASKED, chain[0]] for chain in names])
        ids = self._haystack(tokens)
        room = tokens - len(end)
        places = np.linspace(0, room - 3, len(lines)).astype(np.int64)
        for place, line in zip(places, lines, strict=True):
            ids[place : place + 3] = line
        ids[room:] = end
        return ids, np.arange(room + 2, tokens, 3)

    def codes(self, tokens: int) -> tuple[Ids, Ids]:
        """Lines that tell codes as the multi-key tasks do, and then some of them again."""
        told: list[tuple[Ids, Ids]] = []
        parts: list[Ids] = []
        counted: list[Ids] = []
        size, last = 0, self._chance.uniform(0.35, 0.9) * tokens
        while size < tokens:
            if size < last:
                told.append(line := self._code(long=tokens >= LONG))
            else:
                line = self._words.choice(told)
                counted.append(np.arange(size + len(line[0]), size + len(line[0]) + len(line[1])))
            parts += line
            size += len(line[0]) + len(line[1])
        asked = np.concatenate(counted) if counted else np.zeros(0, np.int64)
        return np.concatenate(parts)[:tokens], asked[asked < tokens]

    def _code(self, *, long: bool) -> tuple[Ids, Ids]:
        """The stem of a line, and its value; ids take many tokens."""
        if long and self._words.random() < 0.3:
            key, value = identifier(self._words), identifier(self._words)
        else:
            key, value = word(self._words, 4), number(self._words)
        stem, rest = self._tokenizer.encode_batch(
            [f"The code of {key} is", f" {value}.\n"], add_special_tokens=False
        )
        return np.array(stem.ids, np.int64), np.array(rest.ids, np.int64)

    def text(self, tokens: int) -> tuple[Ids, Ids]:
        """A part of the library."""
        start = int(self._chance.integers(0, len(self._text) - tokens))
        return self._text[start : start + tokens].copy(), np.arange(1, tokens)

    def _noise(self, tokens: int) -> Ids:
        return self._chance.integers(_FIRST, self._vocabulary, tokens)

    def _haystack(self, tokens: int) -> Ids:
        """Noise or text, whose tokens nobody asks for."""
        return self._noise(tokens) if self._chance.random() < 0.5 else self.text(tokens)[0]
