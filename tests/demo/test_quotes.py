"""Quotes: spread over the document, unambiguous, and stable under tokenisation."""

from __future__ import annotations

import random

import numpy as np
import pytest

from hip_sglang.demo.corpus import Document
from hip_sglang.demo.quotes import occurs_once, pick_quotes
from hip_sglang.demo.vocabulary import Tokenizer


def letters(count: int, alphabet: str, separator: str, seed: int = 0) -> str:
    draw = random.Random(seed)
    return separator.join(
        "".join(draw.choices(alphabet, k=draw.randint(2, 9))) for _ in range(count)
    )


def test_quotes_are_spread_from_the_beginning_to_the_end(
    document: Document, tokenizer: Tokenizer
) -> None:
    depths = [quote.depth for quote in pick_quotes(document, tokenizer, 10)]
    assert depths == sorted(depths)
    assert np.abs(np.array(depths) - np.linspace(0.05, 0.95, 10)).max() < 0.06


def test_a_quote_keeps_its_tokens_in_the_prompt(document: Document, tokenizer: Tokenizer) -> None:
    for quote in pick_quotes(document, tokenizer, 10):
        assert tokenizer.encode(document.text + quote.suffix).ids == [
            *document.ids,
            *quote.suffix_ids,
        ]
        before = document.ids[quote.target - 28 : quote.target]
        assert list(quote.suffix_ids[-28:]) == before
        after = document.ids[quote.target : quote.target + 16]
        assert list(quote.expected_ids) == after
        assert tokenizer.decode(after) == quote.expected
        assert not quote.suffix[-1].isspace()
        assert document.text.count(quote.suffix[1:] + quote.expected) == 1


def test_every_n_gram_of_a_continuation_is_unique(document: Document, tokenizer: Tokenizer) -> None:
    ids = document.ids
    grams = [tuple(ids[i : i + 7]) for i in range(len(ids) - 6)]
    for quote in pick_quotes(document, tokenizer, 10):
        for end in range(quote.target, quote.target + 16):
            assert grams.count(tuple(ids[end - 7 : end])) == 1


def test_quotes_start_at_a_line_start_where_there_is_one(
    document: Document, tokenizer: Tokenizer
) -> None:
    for quote in pick_quotes(document, tokenizer, 10):
        assert f"\n{document.text}".count(quote.suffix) == 1


@pytest.mark.parametrize(
    ("alphabet", "separator"),
    [("abcdefgh", " "), ("".join(map(chr, range(0x4E00, 0x5200))), "\N{IDEOGRAPHIC FULL STOP}")],
)
def test_text_without_lines_can_be_quoted(
    tokenizer: Tokenizer, alphabet: str, separator: str
) -> None:
    document = Document.cut(letters(3000, alphabet, separator), tokenizer, 4096)
    quotes = pick_quotes(document, tokenizer, 8)
    for quote in quotes:
        assert quote.suffix[1:] + quote.expected in document.text
        decoded = tokenizer.decode(list(quote.expected_ids))
        assert decoded.startswith(quote.expected)
        assert len(decoded) - len(quote.expected) <= 2


def test_where_a_depth_has_nothing_to_quote_the_nearest_place_is_taken(
    tokenizer: Tokenizer,
) -> None:
    varied = letters(400, "abcdefgh", "\n")
    document = Document.cut(varied + "\nall the same" * 2000, tokenizer, 1 << 20)
    quotes = pick_quotes(document, tokenizer, 8)
    end = len(varied)
    assert all(document.spans[quote.target][0] < end for quote in quotes)
    targets = [quote.target for quote in quotes]
    assert min(np.diff(targets)) >= 48


def test_a_repetitive_document_is_refused(tokenizer: Tokenizer) -> None:
    document = Document.cut("all the same\n" * 2000, tokenizer, 4096)
    with pytest.raises(ValueError, match="only 0 of 10 places") as refusal:
        pick_quotes(document, tokenizer)
    assert "\n" not in str(refusal.value)


def test_occurs_once_counts_n_grams() -> None:
    ids = np.array([1, 2, 3, 9, 1, 2, 3, 4], dtype=np.int64)
    assert occurs_once(ids, 3).tolist() == [False, True, True, True, False, True]
    assert occurs_once(ids[:2], 3).tolist() == []
