"""Kernels compile for cards that are not there, and what they take is told."""

import pytest
import torch
import triton
import triton.language as tl
from hip_kernels.attend import fused
from hip_kernels.cards import CARDS, compiling_for
from hip_kernels.layout import Choice, LocalPages, PagedKV, QueryBlocks, SparsePlan, Summaries
from triton.runtime.errors import OutOfResources

from scripts.kernels_check import variants


@triton.jit
def add_rows(x, y, z, rows: tl.constexpr, width: tl.constexpr):
    at = tl.arange(0, rows)[:, None] * width + tl.arange(0, width)[None, :]
    tl.store(z + at, tl.load(x + at) + tl.load(y + at))


@triton.jit
def multiply(x, y, z, size: tl.constexpr):
    at = tl.arange(0, size)[:, None] * size + tl.arange(0, size)[None, :]
    tl.store(z + at, tl.dot(tl.load(x + at), tl.load(y + at)))


def tensor(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.float16, device="meta")


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_each_kernel_compiles_for_a_card(card):
    # one of the many that `make kernels-check` compiles
    wanted = (
        "pool 80, 4",
        "summarize 80 bfloat16, 4",
        "score 80, group of 8",
        "look bfloat16 80",
        "decode bfloat16 80",
    )
    launches = [launch for name, launch in variants(card) if name.startswith(wanted)]
    with compiling_for(card) as compiled:
        for launch in launches:
            launch()
    kernels = {binary.kernel for binary in compiled.binaries}
    assert kernels == {"_pool", "_summarize", "_score", "_shortlist", "_look", "_decode"}
    for binary in compiled.binaries:
        assert 16 < binary.registers <= 255
        assert binary.spilled_bytes == 0
        assert binary.shared_bytes < card.shared_bytes


@pytest.mark.parametrize(
    ("prunes", "held", "launches"), [(True, False, 4), (True, True, 2), (False, False, 1)]
)
def test_a_decode_step_waits_for_nothing(prunes, held, launches):
    """Tensors without data have nothing to wait for: whatever asks for a number raises."""
    batch, heads, kv_heads, pages = 3, 8, 2, 40
    table = torch.empty(batch, pages, dtype=torch.int64, device="meta")
    row = torch.empty(batch, 1, dtype=torch.int64, device="meta")
    blocks = QueryBlocks(
        row, row, row[:, 0], table, LocalPages(table) if prunes else None, row[:, 0]
    )
    rows = torch.empty(pages * 64, kv_heads, 64, dtype=torch.bfloat16, device="meta")
    summaries = Summaries.empty(pages, kv_heads, 64, 64, dtype=torch.float16, device="meta")
    query = torch.empty(batch, heads, 64, dtype=torch.bfloat16, device="meta")
    choice = None
    if held:
        chosen = torch.empty(batch, kv_heads, 32, dtype=torch.int64, device="meta")
        choice = Choice(chosen, torch.empty(batch, kv_heads, heads // kv_heads, device="meta"))
    given = query, PagedKV(rows, rows), summaries, blocks, SparsePlan(second_look=2), 0.1
    with compiling_for(CARDS[1]) as compiled:
        found = fused.attend(*given, torch.empty_like(query), choice)
    assert (found is not None) == prunes
    assert compiled.launches == launches


def test_a_spill_is_seen():
    with compiling_for(CARDS[0]) as compiled:
        add_rows[(1,)](*(tensor(1 << 16) for _ in range(3)), rows=32, width=512, num_warps=1)
    assert compiled.binaries[0].spilled_bytes > 0


def test_a_kernel_that_wants_more_shared_memory_than_a_card_has_is_refused():
    with compiling_for(CARDS[0]) as compiled, pytest.raises(OutOfResources, match="shared memory"):
        multiply[(1,)](*(tensor(1 << 16) for _ in range(3)), size=256, num_warps=8)
    assert not compiled.binaries


def test_afterwards_triton_has_the_driver_that_it_had():
    before = triton.runtime.driver._active
    with pytest.raises(ZeroDivisionError), compiling_for(CARDS[0]):
        raise ZeroDivisionError
    assert triton.runtime.driver._active is before
