"""Kernels compile for cards that are not there, and what they take is told."""

import pytest
import torch
import triton
import triton.language as tl
from hip_kernels.cards import CARDS, compiling_for
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
        "decode bfloat16 80",
    )
    launches = [launch for name, launch in variants(card) if name.startswith(wanted)]
    with compiling_for(card) as binaries:
        for launch in launches:
            launch()
    kernels = {binary.kernel for binary in binaries}
    assert kernels == {"_pool", "_summarize", "_score", "_decode", "_merge"}
    for binary in binaries:
        assert 16 < binary.registers <= 255
        assert binary.spilled_bytes == 0
        assert binary.shared_bytes < card.shared_bytes


def test_a_spill_is_seen():
    with compiling_for(CARDS[0]) as binaries:
        add_rows[(1,)](*(tensor(1 << 16) for _ in range(3)), rows=32, width=512, num_warps=1)
    assert binaries[0].spilled_bytes > 0


def test_a_kernel_that_wants_more_shared_memory_than_a_card_has_is_refused():
    with compiling_for(CARDS[0]) as binaries, pytest.raises(OutOfResources, match="shared memory"):
        multiply[(1,)](*(tensor(1 << 16) for _ in range(3)), size=256, num_warps=8)
    assert not binaries


def test_afterwards_triton_has_the_driver_that_it_had():
    before = triton.runtime.driver._active
    with pytest.raises(ZeroDivisionError), compiling_for(CARDS[0]):
        raise ZeroDivisionError
    assert triton.runtime.driver._active is before
