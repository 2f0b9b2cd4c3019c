"""Quotes from a real document, to be continued as the document does."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

from hip_sglang.demo.corpus import Document, library_text
from hip_sglang.demo.quotes import Quote, pick_quotes, whole_characters
from hip_sglang.demo.vocabulary import Tokenizer

from .sample import BLOCK, Sample, Task

QUOTE_TOKENS, CONTINUATION = 32, 16
# tokens of a prompt after the document, as those of a quote may be a few more where it stands alone
_ROOM = 64
_LEAST = 2048


@dataclass(frozen=True)
class Quotes(Task):
    """Any model that looks things up can do this, and the built-in model was made for it.

    Ten samples have one document, their quotes from everywhere in it: the beginning of ``text``
    turned to start elsewhere, or Python's library in another order of modules. A document ends
    with a whole line, so prompts are less exactly as long as is asked.
    """

    text: str | None = None
    name = "quotes"

    def sample(self, tokenizer: Tokenizer, length: int, seed: int, index: int) -> Sample:
        """Raises ValueError, too, where the document is shorter, or has no ten places to quote."""
        if length < _LEAST:
            raise ValueError(
                f"{length:,} tokens are too short for the task {self.name}; give {_LEAST:,} or more"
            )
        block, number = divmod(index, BLOCK)
        document, quotes = _read(self.text, tokenizer, length, f"{self.name} {seed} {block}")
        # those of a document come from its beginning to its end
        quote = quotes[number]
        text = document.text + quote.suffix
        return Sample(
            text,
            tuple(tokenizer.encode(text).ids),
            (quote.expected,),
            (document.spans[quote.target][0] / len(text),),
            CONTINUATION,
            between="",
        )

    def score(self, sample: Sample, completion: str) -> float:
        """1 where the completion is the document's, character by character, else 0.

        Not counted are a last character that the last token leaves incomplete, and spaces in
        front, which some tokenizers lose when they decode a part of a text.
        """
        (expected,) = sample.answers
        return float(whole_characters(completion).lstrip(" ") == expected.lstrip(" "))


@lru_cache(maxsize=2)
def _read(
    text: str | None, tokenizer: Tokenizer, length: int, name: str
) -> tuple[Document, list[Quote]]:
    chance = random.Random(name)
    if text is None:
        whole = library_text(chance.getrandbits(32))
    else:
        start = text.find("\n", int(chance.random() * len(text))) + 1
        whole = f"{text[start:]}\n{text[:start]}"
    room = length - _ROOM - CONTINUATION
    document = Document.cut(whole, tokenizer, room)
    if len(document.ids) < 0.9 * room:
        raise ValueError(
            f"the document has {len(document.ids):,} tokens, fewer than the {room:,} that a length "
            f"of {length:,} takes; give a longer one, or a smaller length"
        )
    quotes = pick_quotes(
        document, tokenizer, BLOCK, quote_tokens=QUOTE_TOKENS, continuation=CONTINUATION
    )
    return document, quotes
