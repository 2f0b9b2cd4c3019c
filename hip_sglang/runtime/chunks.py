"""Chunks of a prompt end where a page ends, so that the rows of a page select together.

SGLang takes the decode steps that it may mix in, and what memory lacks, off a chunk by the token.
The parts of a page would then choose apart, and an answer would depend on who else was there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hip_sglang.runtime.requirements import BACKEND


def init_adder(original: Callable[..., None], adder: Any, *args: Any, **kwargs: Any) -> None:
    """Around ``PrefillAdder.__init__``: what decode steps leave of a chunk is whole pages."""
    original(adder, *args, **kwargs)
    if adder.rem_chunk_tokens is not None and _ours():
        adder.rem_chunk_tokens = whole_pages(adder.rem_chunk_tokens, adder.page_size)


def available_chunk_tokens(original: Callable[..., int], budget: Any, chunk_limit: int) -> int:
    """Around ``PrefillBudget.available_chunk_tokens``: what memory leaves of one is, too."""
    available = original(budget, chunk_limit)
    return whole_pages(available, budget.page_size) if _ours() else available


def whole_pages(tokens: int, page_size: int) -> int:
    """``tokens`` rounded down to pages, but one page at least: a prompt must get on."""
    return max(1, tokens // page_size) * page_size


def _ours() -> bool:
    from sglang.srt.runtime_context import attention_backends

    return BACKEND in attention_backends()
