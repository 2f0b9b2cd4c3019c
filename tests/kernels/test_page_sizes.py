"""Pages of other sizes than 64, which a process has from its start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hip_kernels.page_size import PAGE_SIZES, VARIABLE

HERE = Path(__file__).parent
# prompts and decode steps against plain loops, and a head wider than 128
FEW = [
    "test_fused.py::test_a_batch_equals_plain_loops[{'second_look': 2, 'top_p': 0.5, 'parts': 4}]",
    "test_prefill_triton.py::test_attention_equals_the_reference"
    "[{'heads': 2, 'kv_heads': 1, 'width': 160, 'value_width': 136}-{}]",
]
# the reference; chunks; nodes; copies
MORE = [
    *FEW,
    "test_attend.py::test_a_mixed_batch_equals_plain_loops",
    "test_attend.py::test_chunks_of_whole_pages_do_not_change_what_is_computed",
    "test_offloaded_triton.py::test_blocks_and_steps_read_copies",
    "test_prefill_triton.py::test_a_search_through_nodes_equals_the_reference",
    "test_prefill_triton.py::test_blocks_near_the_beginning_attend_to_what_there_is",
    "test_summarize_triton.py",
]
pytestmark = pytest.mark.interpreter


def test_kernels_work_in_pages_of_16() -> None:
    passes(FEW, 16)


@pytest.mark.soak
@pytest.mark.parametrize("size", PAGE_SIZES[:-1])
def test_reference_and_kernels_work_in_smaller_pages(size: int) -> None:
    passes(MORE, size)


def passes(names: list[str], size: int) -> None:
    """Run tests in a process whose pages have this size."""
    tests = [str(HERE / name) for name in names]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests],
        env={**os.environ, VARIABLE: str(size)},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
