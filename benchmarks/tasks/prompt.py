"""Prompts that fill a length: as much haystack as there is room for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hip_sglang.demo.vocabulary import Tokenizer

from .sample import Sample

# what a model may say around its answers, and between two of them
_AROUND, _BETWEEN = 8, 3


@dataclass(frozen=True)
class Prompt:
    """A text of any size: opening, haystack, question, and the beginning of the answer."""

    task: str
    opening: str
    haystack: Callable[[int], list[str]]  # so many units -> lines
    ending: str
    least: int = 1  # units

    def text(self, units: int, marks: int = 0) -> str:
        """``marks``: short tokens that say nothing, to fill what is less than a unit."""
        return "\n".join([self.opening + " -" * marks, *self.haystack(units), self.ending])

    def sample(
        self,
        tokenizer: Tokenizer,
        length: int,
        answers: tuple[str, ...],
        found_in: tuple[str, ...] = (),
    ) -> Sample:
        """The prompt of at most ``length`` tokens, those to be generated included.

        ``found_in``: for each answer the part of the text that has it. Raises ValueError where the
        least haystack takes more.
        """
        said = (tokenizer.encode(f" {answer}", add_special_tokens=False).ids for answer in answers)
        new_tokens = sum(len(ids) + _BETWEEN for ids in said) + _AROUND
        room = length - new_tokens
        if (least := self._tokens(tokenizer, self.least)) > room:
            raise ValueError(
                f"{length:,} tokens are too short for the task {self.task}, which takes "
                f"{least + new_tokens:,} with this model's tokenizer; give that length or more"
            )
        units = _largest(lambda units: self._tokens(tokenizer, units), self.least, room)
        text = self.text(units)
        marks = room - len(tokenizer.encode(text).ids)
        # a mark is one token or, with some tokenizers, more
        while len(ids := tokenizer.encode(text := self.text(units, marks)).ids) > room:
            marks -= max(1, (len(ids) - room) // 2)
        depths = tuple(text.index(part) / len(text) for part in found_in)
        return Sample(text, tuple(ids), answers, depths, new_tokens)

    def _tokens(self, tokenizer: Tokenizer, units: int) -> int:
        return len(tokenizer.encode(self.text(units)).ids)


def _largest(count: Callable[[int], int], least: int, room: int) -> int:
    """The largest n whose ``count(n)`` is at most ``room``, where ``count(least)`` is.

    Counts grow nearly evenly, and each takes the time to make a text of that size.
    """
    low, at_low = least, count(least)
    high = least + 32
    while (at_high := count(high)) <= room:
        more = (room - at_high) * (high - low) / (at_high - at_low)
        low, at_low, high = high, at_high, high + int(1.02 * more) + 1
    while high - low > 1:
        guess = low + int((room - at_low) / (at_high - at_low) * (high - low))
        guess = min(max(guess, low + 1), high - 1)
        if (at_guess := count(guess)) <= room:
            low, at_low = guess, at_guess
        else:
            high, at_high = guess, at_guess
    return low
