"""Words that stand in the text more often than others.

A model must weigh the whole text and list what it found, so these are for models that have learnt
to. The built-in model copies, and cannot.
"""

from __future__ import annotations

from functools import partial

from scipy.special import zeta

from hip_sglang.demo.vocabulary import Tokenizer

from .prompt import Prompt, Question
from .sample import Sample, Task
from .words import Draw, distinct, word

_SYLLABLES = 3
_WORDS_A_LINE = 12

COMMON, COMMON_TIMES, OTHER_TIMES = 10, 24, 3
FREQUENT, ALPHA = 3, 2.0


class CommonWords(Task):
    """Ten words stand in a list 24 times each, all others three times."""

    name = "common"

    def sample(self, tokenizer: Tokenizer, length: int, seed: int, index: int) -> Sample:
        draw = Draw(self.name, seed, index)

        def words(others: int) -> list[str]:
            return distinct(partial(word, draw.chance("words"), _SYLLABLES), COMMON + others)

        def haystack(others: int) -> list[str]:
            found = words(others)
            return _lines(draw, found[:COMMON] * COMMON_TIMES + found[COMMON:] * OTHER_TIMES)

        opening = f"In this list {COMMON} words stand far more often than all others."
        ending = f"Which {COMMON} words stand in the list most often?\nThe most common words are:"
        question = Question(ending, tuple(words(0)))
        prompt = Prompt(self.name, opening, haystack, [question], least=COMMON)
        return prompt.sample(tokenizer, length)


class FrequentWords(Task):
    """Words as often as a zeta distribution has them; the three most frequent are asked."""

    name = "frequent"

    def sample(self, tokenizer: Tokenizer, length: int, seed: int, index: int) -> Sample:
        draw = Draw(self.name, seed, index)

        def words(count: int) -> list[str]:
            return distinct(partial(word, draw.chance("words"), _SYLLABLES), count)

        def haystack(units: int) -> list[str]:
            counts = zeta_counts(units)
            return _lines(
                draw,
                [
                    each
                    for each, times in zip(words(len(counts)), counts, strict=True)
                    for _ in range(times)
                ],
            )

        opening = "In this list some words stand far more often than others."
        ending = (
            f"Which {FREQUENT} words stand in the list most often?\nThe most frequent words are:"
        )
        question = Question(ending, tuple(words(FREQUENT)))
        prompt = Prompt(self.name, opening, haystack, [question], least=100)
        return prompt.sample(tokenizer, length)


def zeta_counts(total: int) -> list[int]:
    """How often the word of each rank stands in a list of so many: its share is rank^-ALPHA."""
    counts: list[int] = []
    left = total
    while left:
        share = (len(counts) + 1) ** -ALPHA / float(zeta(ALPHA))
        counts.append(min(left, max(1, int(total * share))))
        left -= counts[-1]
    return counts


def _lines(draw: Draw, words: list[str]) -> list[str]:
    draw.chance("order").shuffle(words)
    starts = range(0, len(words), _WORDS_A_LINE)
    return [" ".join(words[start : start + _WORDS_A_LINE]) for start in starts]
