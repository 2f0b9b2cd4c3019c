"""Python's library by modules: what the small model learns from, and what is held out."""

from __future__ import annotations

import zlib

from hip_sglang.demo.corpus import standard_library


def learned() -> list[str]:
    """Nine modules of ten."""
    return [text for text in standard_library() if not _is_held_out(text)]


def held_out() -> list[str]:
    """The others."""
    return [text for text in standard_library() if _is_held_out(text)]


def _is_held_out(text: str) -> bool:
    return zlib.crc32(text.encode()) % 10 == 0
