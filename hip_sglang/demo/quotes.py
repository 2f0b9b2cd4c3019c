"""Quotes from a document whose continuation is decided by the document alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hip_sglang.demo.architecture import OFFSETS
from hip_sglang.demo.corpus import Document
from hip_sglang.demo.vocabulary import END_OF_TEXT_ID, Tokenizer

# the first tokens of a quote may differ from the document's where it does not start at a line start
_UNSTABLE_START = 4
# a character of UTF-8 has four bytes at most, and a token at least one
_CHARACTER_TOKENS = 4


@dataclass(frozen=True)
class Quote:
    """A question to the model: the document, then ``suffix``; the answer is ``expected``."""

    depth: float  # where the answer stands in the document, 0..1
    target: int  # the index in the document of the answer's first token
    suffix: str  # a line break and the quote; its tokens follow the document's unchanged
    suffix_ids: tuple[int, ...]
    expected: str  # without the last character where the answer ends within it
    expected_ids: tuple[int, ...]


def pick_quotes(
    document: Document,
    tokenizer: Tokenizer,
    count: int = 10,
    *,
    quote_tokens: int = 32,
    continuation: int = 16,
) -> list[Quote]:
    """``count`` quotes, their depths spread evenly from 5% to 95% of the document.

    At each depth the nearest eligible line start is taken; where none is nearer than half the way
    to the next depth, the nearest eligible token anywhere. A place is eligible when every 7-gram
    that the continuation is predicted from occurs once in the document, the quote ends in no white
    space and with a whole character, its tokens are the document's when it is tokenised by itself,
    and no earlier quote overlaps. Raises ValueError where the document has fewer such
    places.
    """
    if count < 1 or quote_tokens < 2 * OFFSETS:
        raise ValueError(
            f"count={count} must be positive and quote_tokens={quote_tokens} at least 14"
        )
    places = _Places(document, tokenizer, quote_tokens, continuation)
    depths = np.linspace(0.05, 0.95, count)
    reach = int(len(document.ids) * 0.45 / max(1, count - 1))
    quotes: list[Quote] = []
    for depth in depths:
        quote = places.take_nearest(int(depth * len(document.ids)), reach)
        if quote is None:
            raise ValueError(
                f"the document has only {len(quotes)} of {count} places that can be quoted without "
                f"ambiguity (in {len(document.ids):,} tokens); give a longer or more varied text"
            )
        quotes.append(quote)
    return sorted(quotes, key=lambda quote: quote.target)


def whole_characters(text: str) -> str:
    """Decoded tokens without the last character where its bytes are not all there."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


def occurs_once(ids: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.bool_]:
    """Whether the ``length``-gram that starts at each token occurs once -> [len(ids) - length + 1].

    Compares 64-bit hashes: a collision could only make a unique n-gram look repeated.
    """
    grams = len(ids) - length + 1
    hashes = np.zeros(max(0, grams), dtype=np.uint64)
    multiplier = np.uint64(0x9E3779B97F4A7C15)
    for offset in range(length):
        hashes = hashes * multiplier + ids[offset : offset + grams].astype(np.uint64) + np.uint64(1)
    _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    once: npt.NDArray[np.bool_] = counts[inverse] == 1
    return once


class _Places:
    """The places of a document where a quote may start, each used at most once."""

    def __init__(
        self, document: Document, tokenizer: Tokenizer, quote_tokens: int, continuation: int
    ) -> None:
        self._document = document
        self._tokenizer = tokenizer
        self._quote_tokens = quote_tokens
        self._continuation = continuation
        # a quote is longer where it would end within a character
        self._length = quote_tokens + _CHARACTER_TOKENS - 1 + continuation
        ids = np.asarray(document.ids, dtype=np.int64)
        begins, ends = np.asarray(document.spans, dtype=np.int64).T
        places = max(0, len(ids) - self._length)

        # each token of the continuation is predicted from the n-gram that ends before it
        repeated = np.cumsum(np.concatenate([[0], ~occurs_once(ids, OFFSETS)]))
        first = np.arange(places) + quote_tokens - OFFSETS
        ambiguous = repeated[first + self._length - quote_tokens] - repeated[first]
        special = np.cumsum(np.concatenate([[0], ids == END_OF_TEXT_ID]))
        silent = special[self._length : self._length + places] - special[:places]
        # the tokens of one character share its span
        self._whole = np.concatenate([[True], begins[1:] >= ends[:-1]])
        self._free = (ambiguous == 0) & (silent == 0) & self._whole[:places]
        characters = np.frombuffer(document.text.encode("utf-32-le"), dtype=np.uint32)
        breaks = characters == ord("\n")
        after_break = (begins == 0) | breaks[begins - 1]
        self._line_start = (after_break & ~breaks[begins])[:places]

    def take_nearest(self, target: int, reach: int) -> Quote | None:
        """The eligible quote whose continuation starts nearest to token ``target``."""
        for start in self._candidates(target - self._quote_tokens, reach):
            quote = self._quote(start)
            if quote is None:
                # its tokens will not change
                self._free[start] = False
                continue
            self._free[max(0, start - self._length + 1) : start + self._length] = False
            return quote
        return None

    def _candidates(self, start: int, reach: int) -> Iterator[int]:
        """Free line starts within reach, then all other free places; nearest first."""
        free = np.flatnonzero(self._free)
        distance = np.abs(free - start)
        preferred = self._line_start[free] & (distance <= reach)
        order = np.lexsort((distance, ~preferred))
        yield from (int(place) for place in free[order])

    def _quote(self, start: int) -> Quote | None:
        """The quote that starts at token ``start``, unless its text does not keep its tokens."""
        document, end = self._document, start + self._quote_tokens
        while not self._whole[end]:
            end += 1
        begin = document.spans[end - 1][1]
        quote = document.text[document.spans[start][0] : begin]
        if quote[-1:].isspace():
            return None
        suffix = "\n" + quote
        suffix_ids = self._tokenizer.encode(suffix).ids
        stable = self._quote_tokens - _UNSTABLE_START
        if suffix_ids[-stable:] != document.ids[end - stable : end]:
            return None
        expected_ids = document.ids[end : end + self._continuation]
        return Quote(
            depth=end / len(document.ids),
            target=end,
            suffix=suffix,
            suffix_ids=tuple(suffix_ids),
            expected=whole_characters(self._tokenizer.decode(expected_ids)),
            expected_ids=tuple(expected_ids),
        )
