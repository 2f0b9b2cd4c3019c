"""The document: Python's library or a user's file, cut to a number of tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from hip_sglang.demo.corpus import Document, library_text, read_text, standard_library
from hip_sglang.demo.vocabulary import Tokenizer


def test_the_library_is_read_in_the_same_order_every_time(library: str) -> None:
    assert library_text() == library
    assert library_text(seed=1) != library
    assert len(library_text(seed=1)) == len(library)
    assert len(standard_library()) > 200


@pytest.mark.parametrize("tokens", [1500, 2048, 5000])
def test_a_document_is_cut_at_the_end_of_a_line(
    library: str, tokenizer: Tokenizer, tokens: int
) -> None:
    document = Document.cut(library, tokenizer, tokens)
    assert tokens - 100 < len(document.ids) <= tokens
    assert library.startswith(document.text)
    assert library[len(document.text)].isspace()
    assert not document.text[-1].isspace()
    assert document.ids == tokenizer.encode(document.text).ids


def test_text_without_line_breaks_is_cut_at_a_token(library: str, tokenizer: Tokenizer) -> None:
    document = Document.cut(" ".join(library[:50_000].split()), tokenizer, 2048)
    assert 1900 < len(document.ids) <= 2048


def test_a_short_text_is_taken_whole(library: str, tokenizer: Tokenizer) -> None:
    document = Document.cut(library[:20_000] + "x\n\n", tokenizer, 1 << 20)
    assert document.text == library[:20_000] + "x"


def test_what_follows_a_line_break_does_not_change_the_tokens_before_it(
    document: Document, tokenizer: Tokenizer
) -> None:
    for suffix in ("\nimport os", "\n    return x", "\n\n\tx", "\n日本語"):
        joined = tokenizer.encode(document.text + suffix).ids
        assert joined == document.ids + tokenizer.encode(suffix).ids


def test_a_file_is_read_with_its_line_ends_unified(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes("\ufeffname\r\nvalue é\r\n".encode())
    assert read_text(path) == "name\nvalue é\n"


def test_a_few_broken_bytes_are_forgiven(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"a line of text, and more\n" * 40 + b"\xff\n")
    assert read_text(path).endswith("\N{REPLACEMENT CHARACTER}\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"\x7fELF\x02\x01\0\0", "is binary"),
        ("ÄÖÜß und so weiter".encode("latin-1"), "is not UTF-8"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refusal:
        read_text(path)
    assert "\n" not in str(refusal.value)
    assert str(path) in str(refusal.value)


def test_a_short_document_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="too short: 3 tokens; at least 1,024 are needed"):
        Document.cut("a b c", tokenizer, 65536)
