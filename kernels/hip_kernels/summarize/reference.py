"""A page's summary: mean keys, per-channel deviation, mean value; and that of several pages."""

from __future__ import annotations

import torch
from torch import Tensor

from hip_kernels.layout import Summaries
from hip_kernels.stored import StoredKV


def summarize(kv: StoredKV, pages: Tensor, out: Summaries) -> None:
    """Summarise complete pages from stored keys and values into ``out``.

    pages [C] physical. Means and variances are accumulated in float32, the variance about the
    means (a one-pass variance cancels where a channel carries a large constant).
    """
    if pages.numel() == 0:
        return
    key, value = (x.float() for x in kv.whole(pages))  # [C, 64, Hkv, D]
    key, value = key * kv.key_scale, value * kv.value_scale
    key = key.view(len(pages), out.mean.shape[1], -1, *key.shape[2:])  # [C, L, 64 / L, Hkv, D]
    mean = key.mean(2)
    sigma = (key - mean.unsqueeze(2)).square().mean((1, 2)).sqrt()
    out.mean[:, :, pages] = saturate(mean.permute(2, 1, 0, 3), out.mean)
    out.sigma[:, pages] = saturate(sigma.transpose(0, 1), out.sigma)
    out.value[:, pages] = saturate(value.mean(1).transpose(0, 1), out.value)


def pool(summaries: Summaries, pages: Tensor, nodes: Tensor, out: Summaries) -> None:
    """Summarise nodes from the summaries of their pages into ``out``.

    pages [C, n] physical, in order; nodes [C] where they go. A node has one mean, however many a
    page has; its deviation about it follows by the law of total variance.
    """
    if nodes.numel() == 0:
        return
    count, size = pages.shape
    near = summaries.take(pages.flatten())
    heads, means, _, width = near.mean.shape
    mean = near.mean.view(heads, means, count, size, width)
    centre = mean.mean((1, 3))  # [Hkv, C, D]
    between = (mean - centre[:, None, :, None]).square().mean((1, 3))
    within = near.sigma.view(heads, count, size, width).square().mean(2)
    out.mean[:, 0, nodes] = saturate(centre, out.mean)
    out.sigma[:, nodes] = saturate((within + between).sqrt(), out.sigma)
    value = near.value.view(heads, count, size, -1).mean(2)
    out.value[:, nodes] = saturate(value, out.value)


def saturate(what: Tensor, like: Tensor) -> Tensor:
    """Cast to the dtype of ``like``; a value past its range becomes its largest, never infinite."""
    limit = torch.finfo(like.dtype).max
    return what.clamp(-limit, limit).to(like.dtype)
