"""One question, what is right about its answer, and what a task is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from hip_sglang.demo.vocabulary import Tokenizer

# samples of one document, in tasks that have such: a server's prefix cache then reads it once
BLOCK = 10


@dataclass(frozen=True)
class Sample:
    """A prompt, and what its completion should hold."""

    text: str
    ids: tuple[int, ...]  # of the text, with the special tokens that the tokenizer puts before it
    answers: tuple[str, ...]
    # where in the text what answers stands, 0..1 by characters, in the answers' order; empty where
    # it stands all over the text
    depths: tuple[float, ...]
    new_tokens: int  # to be generated: the answers', and some around them
    between: str = " "  # the prompt and its answer
    wrong: tuple[str, ...] = ()  # what is taken for answers; each that is said takes one away


class Task(ABC):
    """A kind of question. The same tokenizer, length, seed and index give the same sample."""

    name: ClassVar[str]

    @abstractmethod
    def sample(self, tokenizer: Tokenizer, length: int, seed: int, index: int) -> Sample:
        """The ``index``-th sample; prompt and new tokens take ``length`` tokens together, or less.

        Raises ValueError where that is too short for the task.
        """
        ...

    def score(self, sample: Sample, completion: str) -> float:
        """What of the sample is right, 0..1."""
        right, wrong = (recall(some, completion) for some in (sample.answers, sample.wrong))
        return max(0.0, right - wrong)


def recall(answers: tuple[str, ...], completion: str) -> float:
    """The share of the answers that stand somewhere in the completion, in whatever case."""
    said = completion.casefold()
    return sum(answer.casefold() in said for answer in answers) / max(1, len(answers))
