"""Needles: one line of the text says what is asked, and the prompt ends as that line begins.

All of these ask a model no more than to find the place where the same words stand, and to copy
what follows. What tells that place from others is among the last seven tokens, so the built-in
model can do it. A question does not name the key: six of seven tokens would stand there, too, and
that near, the built-in model takes them for the needle.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from functools import partial

from hip_sglang.demo.vocabulary import Tokenizer

from .prompt import Prompt, Question
from .sample import BLOCK, Sample, Task
from .words import Draw, distinct, identifier, number, placed, sentences, word

# longer than the words of the noise
_KEY_SYLLABLES, _PLACE_SYLLABLES = 4, 3
VALUES = 4
# lines before a needle that a question repeats
_BEFORE = 2


class SingleNeedle(Task):
    """One line that tells a number, among noise."""

    name = "needle"

    def sample(self, tokenizer: Tokenizer, length: int, seed: int, index: int) -> Sample:
        draw = Draw(self.name, seed, index)
        chance = draw.chance("needle")
        key, value = word(chance, _KEY_SYLLABLES), number(chance)
        stem = f"The number of {key} is"
        needle = f"{stem} {value}."

        def haystack(units: int) -> list[str]:
            return placed(sentences(draw.chance("noise"), units), [(draw.depth, needle)])

        opening = "Somewhere in this text a number is told. Remember it."
        ending = f"Say the number again.\n{stem}"
        question = Question(ending, (value,), (needle,))
        return Prompt(self.name, opening, haystack, [question]).sample(tokenizer, length)


class ContextNeedles(Task):
    """Lines that tell numbers, among noise; a question repeats what stands before one of them.

    The ten samples of one text are as many questions, so that a prefix cache reads it once. What a
    question repeats tells the line's surroundings, which summaries of pages can see.
    """

    name = "needle_context"

    def sample(self, tokenizer: Tokenizer, length: int, seed: int, index: int) -> Sample:
        block, asked = divmod(index, BLOCK)
        draw = Draw(self.name, seed, block)
        chance = draw.chance("needles")
        keys = distinct(partial(word, chance, _KEY_SYLLABLES), BLOCK)
        values = distinct(partial(number, chance), BLOCK)
        before = sentences(chance, BLOCK * _BEFORE)
        needles, questions = [], []
        for at, (key, value) in enumerate(zip(keys, values, strict=True)):
            stem = f"The number of {key} is"
            known = "\n".join([*before[at * _BEFORE : (at + 1) * _BEFORE], stem])
            needles.append(f"{known} {value}.")
            ending = f"Say what follows these lines.\n{known}"
            questions.append(Question(ending, (value,), (needles[-1],)))
        depths = [(at + chance.random()) / BLOCK for at in range(BLOCK)]

        def haystack(units: int) -> list[str]:
            noise = sentences(draw.chance("noise"), units)
            return placed(noise, list(zip(depths, needles, strict=True)))

        opening = f"{BLOCK} lines of this text tell a number each. Remember all of them."
        return Prompt(self.name, opening, haystack, questions).sample(tokenizer, length, asked)


class _MultiKey(Task):
    """The text is nothing but lines that tell something, each of another key."""

    @abstractmethod
    def key(self, chance: random.Random) -> str: ...

    @abstractmethod
    def value(self, chance: random.Random) -> str: ...

    def sample(self, tokenizer: Tokenizer, length: int, seed: int, index: int) -> Sample:
        draw = Draw(self.name, seed, index)

        def lines(count: int) -> list[str]:
            keys = distinct(partial(self.key, draw.chance("keys")), count)
            values = distinct(partial(self.value, draw.chance("values")), count)
            return [f"The code of {k} is {v}." for k, v in zip(keys, values, strict=True)]

        def haystack(units: int) -> list[str]:
            needle, *others = lines(1 + units)
            return placed(others, [(draw.depth, needle)])

        (needle,) = lines(1)
        key, value = self.key(draw.chance("keys")), self.value(draw.chance("values"))
        opening = "Every line of this text tells a code. Remember all of them."
        ending = f"Say one of the codes again.\nThe code of {key} is"
        question = Question(ending, (value,), (needle,))
        return Prompt(self.name, opening, haystack, [question]).sample(tokenizer, length)


class MultiKeyWords(_MultiKey):
    """A text that is nothing but needles; keys are words, values numbers."""

    name = "multikey2"

    def key(self, chance: random.Random) -> str:
        return word(chance, _KEY_SYLLABLES)

    def value(self, chance: random.Random) -> str:
        return number(chance)


class MultiKeyIds(_MultiKey):
    """A text that is nothing but needles; keys and values are ids of 36 characters."""

    name = "multikey3"

    def key(self, chance: random.Random) -> str:
        return identifier(chance)

    def value(self, chance: random.Random) -> str:
        return identifier(chance)


class MultiValue(Task):
    """Four numbers of one key, one in each of four places, among noise.

    A completion has one place to continue from, so a sample asks for one of them; the other three
    are there to be mistaken for it.
    """

    name = "multivalue"

    def sample(self, tokenizer: Tokenizer, length: int, seed: int, index: int) -> Sample:
        draw = Draw(self.name, seed, index)
        chance = draw.chance("needles")
        key = word(chance, _KEY_SYLLABLES)
        values = distinct(partial(number, chance), VALUES)
        # a word each: as digits, places would differ in a single token
        places = distinct(partial(word, chance, _PLACE_SYLLABLES), VALUES)
        stems = [f"The number of {key} in {place} is" for place in places]
        needles = [f"{stem} {value}." for stem, value in zip(stems, values, strict=True)]
        depths = [(draw.depth + place / VALUES) % 1 for place in range(VALUES)]

        def haystack(units: int) -> list[str]:
            noise = sentences(draw.chance("noise"), units)
            return placed(noise, list(zip(depths, needles, strict=True)))

        opening = f"This text tells numbers in {VALUES} places. Remember all of them."
        ending = f"Say one of the numbers again.\n{stems[0]}"
        question = Question(ending, (values[0],), (needles[0],))
        return Prompt(self.name, opening, haystack, [question]).sample(tokenizer, length)
