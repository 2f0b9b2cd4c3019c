"""The document that the demo reads: the Python standard library's source, or a user's file."""

from __future__ import annotations

import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from hip_sglang.demo.vocabulary import Tokenizer

# other people's code, and what differs between two builds of the same Python
_EXCLUDED = ("test", "idlelib", "encodings", "site-packages", "dist-packages", "config-", "__")

MINIMUM_TOKENS = 1024


def standard_library() -> list[str]:
    """The text of each module of the running Python's standard library, in the order of names."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [
        path.relative_to(root) for pattern in ("*.py", "*/*.py") for path in root.glob(pattern)
    ]
    ours = [
        path
        for path in sorted(paths, key=Path.as_posix)
        if not path.name.startswith("_sysconfigdata")
        and not any(part.startswith(_EXCLUDED) for part in path.parts[:-1])
    ]
    return [(root / path).read_text(encoding="utf-8", errors="replace") for path in ours]


def library_text(seed: int = 0) -> str:
    """The standard library as one text, its modules in an order that only the seed decides."""
    modules = standard_library()
    random.Random(seed).shuffle(modules)
    return "\n".join(modules)


def read_text(path: Path) -> str:
    """A user's file as text: UTF-8, a few broken bytes forgiven, line ends made ``\\n``.

    Raises ValueError, in one line, where the file cannot be read, is empty or is not text.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"the document {path} cannot be read: {error.strerror}") from None
    if b"\0" in raw:
        raise ValueError(f"the document {path} is binary (it has zero bytes); give a UTF-8 text")
    text = raw.decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
    if not text.strip():
        raise ValueError(f"the document {path} is empty; give a UTF-8 text")
    broken = text.count("\N{REPLACEMENT CHARACTER}") / len(text)
    if broken > 0.01:
        raise ValueError(
            f"the document {path} is not UTF-8 ({broken:.0%} does not decode); convert it first"
        )
    return text


@dataclass(frozen=True)
class Document:
    """A text together with its tokens.

    It never ends in white space. The tokenizer starts afresh at a line break that follows anything
    else, so the tokens of ``text + "\\n" + quote`` are ``ids`` and then those of ``"\\n" + quote``.
    """

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]  # the characters of each token, [start, end)

    @classmethod
    def cut(cls, text: str, tokenizer: Tokenizer, tokens: int) -> Document:
        """The beginning of ``text``: as many whole lines as fit into ``tokens`` tokens.

        A text of fewer tokens is taken whole. Raises ValueError where less than ``MINIMUM_TOKENS``
        tokens are left.
        """
        # a token of source code is 3 to 4 characters long; longer ones are rare, so this terminates
        characters = 8 * tokens
        encoding = tokenizer.encode(text[:characters])
        while len(encoding.ids) < tokens and characters < len(text):
            characters *= 2
            encoding = tokenizer.encode(text[:characters])
        text = text[:characters]
        limit = tokens
        while len(encoding.ids) > tokens or text != text.rstrip():
            end = encoding.offsets[min(limit, len(encoding.ids)) - 1][1]
            line_end = text.rfind("\n", 0, end + 1)
            # text without line breaks is cut at a token
            text = text[: line_end if line_end > end // 2 else end].rstrip()
            encoding = tokenizer.encode(text)
            limit -= 8
        if len(encoding.ids) < min(tokens, MINIMUM_TOKENS):
            raise ValueError(
                f"the document is too short: {len(encoding.ids):,} tokens; "
                f"at least {MINIMUM_TOKENS:,} are needed"
            )
        return cls(text, encoding.ids, encoding.offsets)
