"""What chance decides in a sample: words that no language has, numbers, ids and depths."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
# its multiples, whole turns left out, stay evenly spread however many there are
_GOLDEN = (5**0.5 - 1) / 2
_NOISE_WORDS = 300


@dataclass(frozen=True)
class Draw:
    """The chance of one sample: the same for the same purpose, whatever else was drawn."""

    task: str
    seed: int
    index: int

    def chance(self, purpose: str) -> random.Random:
        return random.Random(f"{self.task} {self.seed} {self.index} {purpose}")

    @property
    def depth(self) -> float:
        """0..1; those of the samples 0, 1, 2, ... of one seed are spread evenly."""
        start = random.Random(f"{self.task} {self.seed}").random()
        return (start + self.index * _GOLDEN) % 1


def distinct(make: Callable[[], str], count: int) -> list[str]:
    """So many different ones; fewer are the beginning of more."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[make()] = None
    return list(found)


def word(chance: random.Random, syllables: int) -> str:
    """Words of as many syllables are equally long, so none stands within another."""
    return "".join(chance.choice(_CONSONANTS) + chance.choice(_VOWELS) for _ in range(syllables))


def number(chance: random.Random) -> str:
    """Seven digits."""
    return str(chance.randrange(1_000_000, 10_000_000))


def identifier(chance: random.Random) -> str:
    """36 characters, as of a UUID."""
    return str(uuid.UUID(int=chance.getrandbits(128), version=4))


def sentences(chance: random.Random, count: int) -> list[str]:
    """Noise: sentences of short words; fewer are the beginning of more."""
    words = distinct(lambda: word(chance, 2), _NOISE_WORDS)
    return [
        " ".join(chance.choices(words, k=chance.randint(8, 14))).capitalize() + "."
        for _ in range(count)
    ]


def placed(lines: list[str], needles: list[tuple[float, str]]) -> list[str]:
    """Lines with each needle at its depth among them, 0..1."""
    found = list(lines)
    # from the end, so that those before stay where they are
    for depth, needle in sorted(needles, reverse=True):
        found.insert(int(depth * (len(lines) + 1)), needle)
    return found
