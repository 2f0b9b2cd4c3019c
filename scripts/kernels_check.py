"""Compiles every kernel variant that we ship, for every card, without a GPU.

Prints a line for each; exit code 1 where one spills registers or wants more shared memory than a
block of that card has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from hip_kernels.cards import CARDS, Card, compiling_for
from hip_kernels.layout import NODE_PAGES, PAGE_SIZE, PagedKV, Summaries
from hip_kernels.summarize.triton import pool, summarize
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

WIDTHS = (64, 80, 96, 128, 256)
STORED = (torch.bfloat16, torch.float16, torch.float8_e5m2, torch.float8_e4m3fn)
PAGES = 32
HEADS = 8

Variant = tuple[str, Callable[[], None]]


def variants(card: Card) -> Iterator[Variant]:
    """What each launch is called, and the launch: on tensors without memory."""
    for width in WIDTHS:
        for means in (1, 4):
            yield f"pool {width}, {means} means", lambda w=width, m=means: launch_pool(w, m)
            for stored in STORED:
                # its conversions came with Ada
                if stored == torch.float8_e4m3fn and card.capability < 89:
                    continue
                yield (
                    f"summarize {width} {str(stored).removeprefix('torch.')}, {means} means",
                    lambda w=width, m=means, s=stored: launch_summarize(w, m, s),
                )


def launch_summarize(width: int, means: int, stored: torch.dtype) -> None:
    rows = torch.empty(PAGES * PAGE_SIZE, HEADS, width, dtype=stored, device="meta")
    summarize(PagedKV(rows, rows), places(2), summaries(width, means))


def launch_pool(width: int, means: int) -> None:
    found = summaries(width, means)
    pool(found, places(2, NODE_PAGES), places(2), found)


def summaries(width: int, means: int) -> Summaries:
    half = torch.float16
    return Summaries.empty(PAGES, HEADS, width, width, means=means, dtype=half, device="meta")


def places(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


def main() -> int:
    if not isinstance(summarize.__globals__["_summarize"], JITFunction):
        print("kernels-check: TRITON_INTERPRET is set, which compiles nothing; unset it")
        return 2
    failed = 0
    for card in CARDS:
        for name, launch in variants(card):
            try:
                with compiling_for(card) as binaries:
                    launch()
            except OutOfResources as error:
                failed += 1
                print(f"{card.name:7} {name:36} FAILED: {error}", flush=True)
                continue
            for binary in binaries:
                failed += binary.spilled_bytes > 0
                print(
                    f"{card.name:7} {name:36} {binary.registers:4} registers "
                    f"{binary.spilled_bytes:4} bytes spilled {binary.shared_bytes:7,} bytes shared",
                    flush=True,
                )
    print(f"kernels-check: {failed} of the above spill or do not fit" if failed else "all fit")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
