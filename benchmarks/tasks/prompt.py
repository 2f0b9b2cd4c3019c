"""Prompts that fill a length: as much haystack as there is room for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hip_sglang.demo.vocabulary import Tokenizer

from .sample import Sample

# what a model may say around its answers, and between two of them
_AROUND, _BETWEEN = 8, 3


@dataclass(frozen=True)
class Question:
    """What a prompt ends with: a question and the beginning of its answer."""

    ending: str
    answers: tuple[str, ...]
    found_in: tuple[str, ...] = ()  # for each answer the part of the text that has it
    wrong: tuple[str, ...] = ()

    def tokens(self, tokenizer: Tokenizer) -> int:
        """Of the ending."""
        return len(tokenizer.encode(self.ending, add_special_tokens=False).ids)

    def new_tokens(self, tokenizer: Tokenizer) -> int:
        """To be generated."""
        said = (tokenizer.encode(f" {it}", add_special_tokens=False).ids for it in self.answers)
        return sum(len(ids) + _BETWEEN for ids in said) + _AROUND


@dataclass(frozen=True)
class Prompt:
    """A text of any size: opening, haystack, and one of the questions that are asked of it.

    Prompts of other questions are the same up to there, as there is room for the longest.
    """

    task: str
    opening: str
    haystack: Callable[[int], list[str]]  # so many units -> lines
    questions: Sequence[Question]
    least: int = 1  # units

    def text(self, question: Question, units: int, marks: int = 0) -> str:
        """``marks``: short tokens that say nothing, to fill what is less than a unit."""
        return "\n".join([self.opening + " -" * marks, *self.haystack(units), question.ending])

    def sample(self, tokenizer: Tokenizer, length: int, asked: int = 0) -> Sample:
        """The prompt of at most ``length`` tokens, those to be generated included.

        ``asked``: which question. Raises ValueError where the least haystack takes more.
        """
        new_tokens = max(question.new_tokens(tokenizer) for question in self.questions)
        longest = max(self.questions, key=lambda question: question.tokens(tokenizer))

        def tokens(units: int, marks: int = 0) -> int:
            return len(tokenizer.encode(self.text(longest, units, marks)).ids)

        room = length - new_tokens
        if (least := tokens(self.least)) > room:
            raise ValueError(
                f"{length:,} tokens are too short for the task {self.task}, which takes "
                f"{least + new_tokens:,} with this model's tokenizer; give that length or more"
            )
        units = _largest(tokens, self.least, room)
        marks = room - tokens(units)
        # a mark is one token or, with some tokenizers, more
        while (excess := tokens(units, marks) - room) > 0:
            marks -= max(1, excess // 2)
        question = self.questions[asked]
        text = self.text(question, units, marks)
        ids = tuple(tokenizer.encode(text).ids)
        depths = tuple(text.index(part) / len(text) for part in question.found_in)
        return Sample(text, ids, question.answers, depths, new_tokens, wrong=question.wrong)


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
