"""Compiles every kernel for every card, at the head dims, groups and dtypes of models; no GPU.

Prints a line for each; exit code 1 where one spills registers or wants more shared memory than a
block of that card has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from hip_kernels.attend import fused
from hip_kernels.cards import CARDS, Binary, Card, compiling_for
from hip_kernels.layout import (
    NODE_PAGES,
    PAGE_SIZE,
    SUB_PAGES,
    Choice,
    LocalPages,
    QueryBlocks,
    SparsePlan,
    Summaries,
)
from hip_kernels.offloaded import MissPolicy, OffloadedKV
from hip_kernels.page_cache import HostPages, PageCache
from hip_kernels.resolve.triton import write
from hip_kernels.stored import PagedKV, StoredKV
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
            host = partial(launch_summarize, width, means, STORED[0], offloads=True)
            yield f"offloaded summarize {width}, {means} means", host
        for group in GROUPS:
            # models that cap their logits have heads of 128 or 256
            for cap in (0.0, 50.0) if width >= 128 and group == 8 else (0.0,):
                for kept in stored:
                    how = f"{width} {of(kept)}, group of {group}" + (", capped" if cap else "")
                    step = partial(launch_step, width, group, cap, kept)
                    yield f"decode {how}", partial(step, top_p=1.0)
                    yield f"keep-all {how}", partial(step, prunes=False)
            step = partial(launch_step, width, group, 0.0, STORED[0], offloads=True)
            yield f"offloaded decode {width}, group of {group}", step
            blocks = partial(launch_blocks, width, group, 0.0, STORED[0], offloads=True)
            yield f"offloaded prompt {width}, group of {group}", blocks
            yield f"offloaded keep-all {width}, group of {group}", partial(blocks, prunes=False)
            for kept in stored:
                how = f"{width} {of(kept)}, group of {group}"
                blocks = partial(launch_blocks, width, group, 0.0, kept)
                yield f"keep-all prompt {how}", partial(blocks, prunes=False)
                yield f"prompt {how}", blocks
        yield f"offloaded write {width}", partial(launch_write, width)
        capped = partial(launch_blocks, width, 8, 50.0, STORED[0])
        yield f"keep-all prompt {width}, capped", partial(capped, prunes=False)
        if width >= 128:
            yield f"prompt {width}, capped", capped
        enough = partial(launch_blocks, width, 8, 0.0, STORED[0], top_p=0.9)
        yield f"prompt {width}, top_p", enough
        far = partial(launch_blocks, width, 8, 0.0, STORED[0], nodes=True)
        yield f"prompt {width}, nodes", far
        yield f"decode {width}, top_p", partial(launch_step, width, 8, 0.0, STORED[0])
        for group in (8, 32):
            step = partial(launch_step, width, group, 0.0, STORED[0])
            yield f"decode {width}, group of {group}, nodes", partial(step, nodes=True)


def of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def launch_summarize(
    width: int, means: int, stored: torch.dtype, *, offloads: bool = False
) -> None:
    summarize(kv_of(width, stored, offloads), integers(2), summaries(width, means))


def launch_write(width: int) -> None:
    kv = offloaded(width, STORED[0], "fetch")
    rows = torch.empty(2, HEADS, width, dtype=STORED[0], device="meta")
    write(kv, integers(2), rows, rows)


def launch_pool(width: int, means: int) -> None:
    pages, nodes = integers(2, NODE_PAGES), integers(2)
    pool(summaries(width, means), pages, nodes, summaries(width, 1))


def launch_step(
    width: int,
    group: int,
    cap: float,
    stored: torch.dtype,
    *,
    prunes: bool = True,
    nodes: bool = False,
    held: bool = False,
    offloads: bool = False,
    top_p: float = 0.9,
) -> None:
    """A whole decode step; with ``held`` it uses a choice again."""
    row = integers(BATCH, 1)
    table = integers(BATCH, PAGES)
    of_nodes = LocalPages(integers(BATCH, PAGES // NODE_PAGES)) if nodes else None
    local = LocalPages(table) if prunes else None
    blocks = QueryBlocks(row, row, row[:, 0], table, local, row[:, 0], of_nodes)
    query = torch.empty(BATCH, HEADS * group, width, dtype=torch.bfloat16, device="meta")
    kept = summaries(width, 4)
    parts = 1 if held or offloads else SUB_PAGES
    plan = SparsePlan(logit_cap=cap, second_look=2, parts=parts, top_p=top_p)
    kv = kv_of(width, stored, offloads)
    given = query, kv, kept, blocks, plan, 0.1, torch.empty_like(query)
    choice = None
    if held:
        correction = torch.empty(BATCH, HEADS, group, device="meta")
        choice = Choice(integers(BATCH, HEADS, plan.entries), correction)
    fused.attend(*given, nodes=summaries(width, 1), choice=choice)


def launch_blocks(
    width: int,
    group: int,
    cap: float,
    stored: torch.dtype,
    *,
    prunes: bool = True,
    nodes: bool = False,
    offloads: bool = False,
    top_p: float = 1.0,
) -> None:
    """A chunk of a prompt."""
    row, table = integers(BATCH, PAGE_SIZE), integers(1, PAGES)
    local, request = LocalPages(table) if prunes else None, integers(1)
    of_nodes = LocalPages(integers(1, PAGES // NODE_PAGES)) if nodes else None
    blocks = QueryBlocks(row, row, integers(BATCH), table, local, request, of_nodes)
    rows = BATCH * PAGE_SIZE
    query = torch.empty(rows, HEADS * group, width, dtype=torch.bfloat16, device="meta")
    plan = SparsePlan(logit_cap=cap, top_p=top_p)
    kept = summaries(width, 4)
    given = query, kv_of(width, stored, offloads), kept, blocks, plan
    fused.attend(*given, 0.1, torch.empty_like(query), nodes=summaries(width, 1))


def kv_of(width: int, stored: torch.dtype, offloads: bool) -> StoredKV:
    return offloaded(width, stored, "estimate") if offloads else pool_of(width, stored)


def offloaded(width: int, stored: torch.dtype, policy: MissPolicy) -> OffloadedKV:
    shape = PAGES, HEADS, 2 * PAGE_SIZE * width
    host = HostPages(torch.empty(shape, dtype=stored, device="meta"), width, width)
    return OffloadedKV(host, PageCache.empty(PAGES, host, "meta"), stored, policy)


def pool_of(width: int, stored: torch.dtype) -> PagedKV:
    rows = torch.empty(PAGES * PAGE_SIZE, HEADS, width, dtype=stored, device="meta")
    return PagedKV(rows, rows)


def summaries(width: int, means: int) -> Summaries:
    half = torch.float16
    return Summaries.empty(PAGES, HEADS, width, width, means=means, dtype=half, device="meta")


def integers(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


def main() -> int:
    if not isinstance(summarize.__globals__["_summarize"], JITFunction):
        print("kernels-check: TRITON_INTERPRET is set, which compiles nothing; unset it")
        return 2
    failed = 0
    for card in CARDS:
        with compiling_for(card) as compiled:
            for name, launch in variants(card):
                try:
                    launch()
                except OutOfResources as error:
                    failed += 1
                    print(f"{card.name:7} {name:40} FAILED: {error}", flush=True)
                # what an earlier variant has compiled is not compiled again
                for binary in compiled.binaries:
                    failed += binary.spilled_bytes > 0
                    print(f"{card.name:7} {name:40} {told(binary)}", flush=True)
                compiled.binaries.clear()
    print(f"kernels-check: {failed} of the above spill or do not fit" if failed else "all fit")
    return 1 if failed else 0


def told(binary: Binary) -> str:
    return (
        f"{binary.kernel:11} {binary.registers:4} registers {binary.spilled_bytes:4} bytes spilled "
        f"{binary.shared_bytes:7,} bytes shared"
    )


if __name__ == "__main__":
    sys.exit(main())
