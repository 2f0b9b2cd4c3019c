"""Compiles every kernel for every card, at the head dims, groups and dtypes of models; no GPU.

Prints a line for each; exit code 1 where one spills registers or wants more shared memory than a
block of that card has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from hip_kernels.attend.triton import decode
from hip_kernels.cards import CARDS, Card, compiling_for
from hip_kernels.layout import NODE_PAGES, PAGE_SIZE, DecodeSteps, PagedKV, SparsePlan, Summaries
from hip_kernels.select.choose import Chosen, choose
from hip_kernels.select.triton import Scores, score
from hip_kernels.summarize.triton import pool, summarize
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

WIDTHS = (64, 80, 96, 128, 256)
STORED = (torch.bfloat16, torch.float16, torch.float8_e5m2, torch.float8_e4m3fn)
GROUPS = (1, 8)
PAGES = 32
HEADS = 8
BATCH = 3

Variant = tuple[str, Callable[[], None]]


def variants(card: Card) -> Iterator[Variant]:
    """What each launch is called, and the launch: on tensors without memory."""
    # the conversions of e4m3 came with Ada
    stored = [s for s in STORED if s != torch.float8_e4m3fn or card.capability >= 89]
    for width in WIDTHS:
        for means in (1, 4):
            yield f"pool {width}, {means} means", partial(launch_pool, width, means)
            for kept in stored:
                name = f"summarize {width} {of(kept)}, {means} means"
                yield name, partial(launch_summarize, width, means, kept)
        for group in GROUPS:
            # models that cap their logits have heads of 128 or 256
            for cap in (0.0, 50.0) if width >= 128 and group == 8 else (0.0,):
                how = f"{width}, group of {group}" + (", capped" if cap else "")
                yield f"score {how}", partial(launch_score, width, group, cap)
                for kept in stored:
                    given = width, group, cap, kept
                    yield f"decode {of(kept)} {how}", partial(launch_decode, *given, dense=False)
                    yield f"dense {of(kept)} {how}", partial(launch_decode, *given, dense=True)
                    yield f"look {of(kept)} {how}", partial(launch_choose, *given, top_p=1.0)
    for group in GROUPS:
        for top_p in (1.0, 0.9):
            name = f"choose, group of {group}, top_p {top_p}"
            yield name, partial(launch_best, group, top_p)
        yield (
            f"look, group of {group}, top_p 0.9",
            partial(launch_choose, 128, group, 0.0, torch.bfloat16, top_p=0.9),
        )


def of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def launch_summarize(width: int, means: int, stored: torch.dtype) -> None:
    summarize(pool_of(width, stored), integers(2), summaries(width, means))


def launch_pool(width: int, means: int) -> None:
    found = summaries(width, means)
    pages, nodes = integers(2, NODE_PAGES), integers(2)
    pool(found, pages, nodes, found)


def launch_score(width: int, group: int, cap: float) -> None:
    out = Scores.empty(BATCH, HEADS * group, PAGES, 4, torch.device("meta"))
    plan = SparsePlan(logit_cap=cap)
    score(queries(width, group), summaries(width, 4), STEPS, plan, 0.1, out)


def launch_choose(width: int, group: int, cap: float, stored: torch.dtype, top_p: float) -> None:
    scores = Scores.empty(BATCH, HEADS * group, PAGES, 4, torch.device("meta"))
    plan = SparsePlan(logit_cap=cap, second_look=2, top_p=top_p)
    choose(queries(width, group), pool_of(width, stored), scores, STEPS, plan, 0.1)


def launch_best(group: int, top_p: float) -> None:
    scores = Scores.empty(BATCH, HEADS * group, PAGES, 4, torch.device("meta"))
    plan = SparsePlan(top_p=top_p)
    choose(queries(64, group), pool_of(64, torch.bfloat16), scores, STEPS, plan, 0.1)


def launch_decode(width: int, group: int, cap: float, stored: torch.dtype, dense: bool) -> None:
    query = queries(width, group)
    heads = HEADS * group
    logits = torch.empty(BATCH, heads, 0 if dense else PAGES, device="meta")
    share = torch.empty(BATCH, heads, device="meta")
    chosen = None if dense else Chosen(integers(BATCH, HEADS, 32), share)
    plan, found = SparsePlan(logit_cap=cap), torch.empty_like(query)
    given = query, pool_of(width, stored), summaries(width, 4), STEPS, chosen, logits
    decode(*given, plan, 0.1, found, share)


def pool_of(width: int, stored: torch.dtype) -> PagedKV:
    rows = torch.empty(PAGES * PAGE_SIZE, HEADS, width, dtype=stored, device="meta")
    return PagedKV(rows, rows)


def queries(width: int, group: int) -> torch.Tensor:
    return torch.empty(BATCH, HEADS * group, width, dtype=torch.bfloat16, device="meta")


def summaries(width: int, means: int) -> Summaries:
    half = torch.float16
    return Summaries.empty(PAGES, HEADS, width, width, means=means, dtype=half, device="meta")


def integers(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


STEPS = DecodeSteps(integers(BATCH), integers(BATCH), integers(BATCH), integers(BATCH, PAGES))


def main() -> int:
    if not isinstance(summarize.__globals__["_summarize"], JITFunction):
        print("kernels-check: TRITON_INTERPRET is set, which compiles nothing; unset it")
        return 2
    failed = 0
    for card in CARDS:
        for name, launch in variants(card):
            try:
                with compiling_for(card) as compiled:
                    launch()
            except OutOfResources as error:
                failed += 1
                print(f"{card.name:7} {name:44} FAILED: {error}", flush=True)
                continue
            for binary in compiled.binaries:
                failed += binary.spilled_bytes > 0
                print(
                    f"{card.name:7} {name:44} {binary.registers:4} registers "
                    f"{binary.spilled_bytes:4} bytes spilled {binary.shared_bytes:7,} bytes shared",
                    flush=True,
                )
    print(f"kernels-check: {failed} of the above spill or do not fit" if failed else "all fit")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
