"""A page's summary, against the definition."""

from __future__ import annotations

import pytest
import torch
from hip_kernels.layout import PAGE_SIZE, LocalPages, Summaries
from hip_kernels.ops import summarize
from hip_kernels.stored import PagedKV


@pytest.mark.parametrize("means", [1, 4])
def test_only_the_named_pages_are_summarised_and_rightly(means: int) -> None:
    kv = PagedKV(torch.randn(9 * PAGE_SIZE, 3, 20), torch.randn(9 * PAGE_SIZE, 3, 12))
    out = Summaries.empty(9, 3, 20, 12, means=means)
    summarize(kv, torch.tensor([7, 2]), out)
    for page in range(9):
        rows = slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
        for head in range(3):
            if page not in (2, 7):
                assert not out.mean[head, :, page].any()
                continue
            parts = kv.key[rows, head].chunk(means)
            for mean, part in zip(out.mean[head, :, page], parts, strict=True):
                torch.testing.assert_close(mean, part.mean(0))
            centred = torch.cat([part - part.mean(0) for part in parts])
            torch.testing.assert_close(out.sigma[head, page], centred.square().mean(0).sqrt())
            torch.testing.assert_close(out.value[head, page], kv.value[rows, head].mean(0))


def test_the_variance_survives_a_large_constant_and_half_precision_saturates() -> None:
    noise = torch.randn(PAGE_SIZE, 1, 8)
    kv = PagedKV((noise + 3000.0), torch.full((PAGE_SIZE, 1, 8), 1e6))
    out = Summaries.empty(1, 1, 8, 8, means=1, dtype=torch.float16)
    summarize(kv, torch.tensor([0]), out)
    expected = (noise + 3000.0).std(0, correction=0)
    torch.testing.assert_close(out.sigma[:, 0].float(), expected, rtol=5e-3, atol=0)
    assert float(out.value.max()) == torch.finfo(torch.float16).max


def test_taking_a_run_is_a_view_and_an_index_copies() -> None:
    summaries = Summaries.empty(20, 2, 4, 4)
    run = LocalPages(torch.tensor([[5, 6, 7, 8]]))
    assert isinstance(run.pages, slice)
    assert summaries.take(run.pages).mean.untyped_storage().data_ptr() == (
        summaries.mean.untyped_storage().data_ptr()
    )
    far = LocalPages(torch.tensor([[0, 19], [19, 3]]))
    assert isinstance(far.pages, torch.Tensor)
    assert far.pages[far.table].tolist() == [[0, 19], [19, 3]]
