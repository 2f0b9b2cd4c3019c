"""Kernels compile for cards that are not there, and what they take is told."""

from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from hip_kernels.cards import CARDS, compiling_for
from triton.runtime.errors import OutOfResources

from scripts.kernels_check import launch_blocks, launch_step, variants

SHAPE = 64, 4, 0.0, torch.bfloat16

pytestmark = pytest.mark.interpreter


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
        *("pool 80, 4", "summarize 80 bfloat16, 4"),
        *(
            "decode 80, group of 8, nodes",
            "prompt 80 bfloat16",
            "prompt 80, top_p",
            "prompt 80, nodes",
            "offloaded decode 80, group of 8",
            "offloaded write 80",
        ),
    )
    launches = [launch for name, launch in variants(card) if name.startswith(wanted)]
    with compiling_for(card) as compiled:
        for launch in launches:
            launch()
    kernels = {binary.kernel for binary in compiled.binaries}
    assert kernels == {
        *("_pool", "_summarize", "_weigh", "_look", "_decode"),
        *("_mass", "_best", "_best_pages", "_enough", "_exact", "_rest"),
        *("_resolve", "_swap_in", "_write"),
    }
    for binary in compiled.binaries:
        assert 16 < binary.registers <= 255
        assert binary.spilled_bytes == 0
        assert binary.shared_bytes < card.shared_bytes


@pytest.mark.parametrize(
    ("launch", "launches"),
    [
        (partial(launch_step, *SHAPE), 3),
        (partial(launch_step, *SHAPE, held=True), 3),
        (partial(launch_step, *SHAPE, nodes=True), 4),
        (partial(launch_step, *SHAPE, nodes=True, held=True), 4),
        (partial(launch_step, *SHAPE, prunes=False), 1),
        (partial(launch_blocks, *SHAPE), 5),
        (partial(launch_blocks, *SHAPE, top_p=0.9), 6),
        (partial(launch_blocks, *SHAPE, nodes=True), 11),
        (partial(launch_blocks, *SHAPE, prunes=False), 1),
    ],
    ids=lambda given: str(given.keywords) if isinstance(given, partial) else "",
)
def test_attention_waits_for_nothing(launch, launches):
    """Tensors without data have nothing to wait for: whatever asks for a number raises."""
    with compiling_for(CARDS[1]) as compiled:
        launch()
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
