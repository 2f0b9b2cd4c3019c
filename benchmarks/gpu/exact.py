"""Attention and summaries in float64, as plainly as they can be written."""

from __future__ import annotations

import math

import torch
from hip_kernels.layout import PAGE_SIZE
from hip_kernels.stored import PagedKV
from torch import Tensor

from .cases import Case, Layer


def attend_exactly(case: Case, layer: Layer) -> Tensor:
    """Every key of every request: [T, Hq, D] in float64."""
    chunk, kv_heads = case.cell.chunk, case.cell.model.kv_heads
    found = []
    for request, length in enumerate(case.lengths):
        position = torch.arange(length, device=case.table.device)
        slot = case.table[request, position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
        key, value = (rows[slot].double() for rows in (layer.kv.key, layer.kv.value))
        query = layer.query[request * chunk :][:chunk].double().unflatten(1, (kv_heads, -1))
        logits = torch.einsum("rhgd,thd->rhgt", query * case.scale, key)
        future = position > position[-chunk:, None]
        logits = logits.masked_fill(future[:, None, None], -math.inf)
        found.append(torch.einsum("rhgt,thd->rhgd", logits.softmax(-1), value).flatten(1, 2))
    return torch.cat(found)


def summarize_exactly(kv: PagedKV, pages: Tensor, means: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of pages [C]: means [Hkv, L, C, D], deviation about them [Hkv, C, D], value [Hkv, C, Dv]."""
    key, value = (
        rows.unflatten(0, (-1, PAGE_SIZE))[pages].double().permute(2, 0, 1, 3)
        for rows in (kv.key, kv.value)
    )  # [Hkv, C, 64, D]
    parts = key.unflatten(2, (means, -1))
    centre = parts.mean(3)
    deviation = (parts - centre.unsqueeze(3)).square().mean((2, 3)).sqrt()
    return centre.transpose(1, 2), deviation, value.mean(2)


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest error, relative to 1 + what is expected; infinite where a number is none."""
    wanted = expected.double()
    error = (found.to(wanted) - wanted).abs() / (1 + wanted.abs())
    return float(error.nan_to_num(nan=math.inf).max()) if error.numel() else 0.0
