"""A page's summary: mean key, per-channel deviation, mean value, sub-page means."""

from __future__ import annotations

import torch
from torch import Tensor

from hip_kernels.layout import PAGE_SIZE, SUB_PAGE_SIZE, SUB_PAGES, PagedKV, Summaries


def summarize(kv: PagedKV, pages: Tensor, out: Summaries) -> None:
    """Summarise complete pages from stored keys and values into ``out``.

    pages [C] physical. The mean and the variance are accumulated in float32, the variance about
    the mean (a one-pass variance cancels where a channel carries a large constant).
    """

    if pages.numel() == 0:
        return

    def stored(rows: Tensor) -> Tensor:
        return rows.view(-1, PAGE_SIZE, *rows.shape[1:]).index_select(0, pages).float()

    key, value = stored(kv.key), stored(kv.value)  # [C, 64, Hkv, D]

    def put(where: Tensor, what: Tensor) -> None:  # what [C, Hkv, ...]
        where[:, pages] = saturate(what, where).transpose(0, 1)

    put(out.mean, key.mean(1))
    put(out.sigma, key.var(1, correction=0).sqrt())
    put(out.value, value.mean(1))
    if out.sub_mean is not None:
        sub = key.view(-1, SUB_PAGES, SUB_PAGE_SIZE, *key.shape[2:]).mean(2)  # [C, 4, Hkv, D]
        out.sub_mean[:, :, pages] = saturate(sub, out.sub_mean).permute(2, 1, 0, 3)


def saturate(what: Tensor, like: Tensor) -> Tensor:
    """Cast to the dtype of ``like``; a value past its range becomes its largest, never infinite."""
    limit = torch.finfo(like.dtype).max
    return what.clamp(-limit, limit).to(like.dtype)
