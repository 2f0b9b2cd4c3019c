"""Variable tracking: which names have a value that was handed on from name to name?"""

from __future__ import annotations

from functools import partial

from hip_sglang.demo.vocabulary import Tokenizer

from .prompt import Prompt, Question
from .sample import Sample, Task
from .words import Draw, distinct, number, placed, sentences, word

CHAIN = 5
_CHAINS = 2
_NAME_SYLLABLES = 3


class Variables(Task):
    """A chain of assignments in noise, and another one beside it; all names of one are asked.

    Each name of the other one that is said counts against one of these.

    Only the first name stands beside the value: a model must follow four hops and list what it
    found, so this is for models that have learnt to. The built-in model copies, and cannot.
    """

    name = "variables"

    def sample(self, tokenizer: Tokenizer, length: int, seed: int, index: int) -> Sample:
        draw = Draw(self.name, seed, index)
        chance = draw.chance("chains")
        names = distinct(partial(word, chance, _NAME_SYLLABLES), _CHAINS * CHAIN)
        values = distinct(partial(number, chance), _CHAINS)
        lines: list[str] = []
        for chain, value in enumerate(values):
            first, *others = own = names[chain * CHAIN : (chain + 1) * CHAIN]
            lines.append(f"Let {first} be {value}.")
            # a name gets what the one before it in the chain has
            lines += [f"Let {to} be {of}." for of, to in zip(own, others, strict=False)]
        # a chain stands in order, as what is handed on must be there before
        depths = [
            depth for _ in values for depth in sorted(chance.random() for _ in range(CHAIN))
        ]  # fmt: skip

        def haystack(units: int) -> list[str]:
            noise = sentences(draw.chance("noise"), units)
            return placed(noise, list(zip(depths, lines, strict=True)))

        opening = "This text lets names be numbers, or whatever another name is. Remember them."
        ending = (
            f"Which {CHAIN} names are {values[0]}, by themselves or through others?\n"
            f"The names that are {values[0]}:"
        )
        answers, others = tuple(names[:CHAIN]), tuple(names[CHAIN:])
        question = Question(ending, answers, tuple(lines[:CHAIN]), others)
        return Prompt(self.name, opening, haystack, [question]).sample(tokenizer, length)
