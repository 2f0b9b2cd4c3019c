"""The dense attentions that a machine has: what sparse has to beat.

The fastest is the one that ratios are taken against. FlashInfer and FlashAttention-3 read the
paged pool; FlashAttention-2 and torch read it as if its pages were in order, which is faster than
any server can be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from hip_kernels.layout import PAGE_SIZE, SparsePlan
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .cases import Case, Cell, Layer, Model
from .exact import attend_exactly, difference

Attention = Callable[[Layer], Tensor]  # -> [T, Hq, D]
Maker = Callable[[Case], Attention]

LIMIT = 2e-2


def flash_attention_3(case: Case) -> Attention:
    from flash_attn_interface import flash_attn_with_kvcache

    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=case.table.device)
    table = case.table.int()

    def run(layer: Layer) -> Tensor:
        found = flash_attn_with_kvcache(
            _by_request(layer.query, case),
            *_paged(layer),
            cache_seqlens=lengths,
            page_table=table,
            softmax_scale=case.scale,
            causal=True,
        )
        return (found[0] if isinstance(found, tuple) else found).flatten(0, 1)

    return run


def flash_attention_2(case: Case) -> Attention:
    from flash_attn import flash_attn_with_kvcache

    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=case.table.device)

    def run(layer: Layer) -> Tensor:
        found = flash_attn_with_kvcache(
            _by_request(layer.query, case),
            *_in_order(layer, case),
            cache_seqlens=lengths,
            softmax_scale=case.scale,
            causal=True,
        )
        return found.flatten(0, 1)

    return run


def flashinfer(case: Case) -> Attention:
    import flashinfer as library

    model, cell, device = case.cell.model, case.cell, case.table.device
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    each = torch.arange(cell.batch + 1, dtype=torch.int32, device=device)
    last = torch.full((cell.batch,), (cell.context - 1) % PAGE_SIZE + 1, dtype=torch.int32)
    pages = each * cell.pages, case.table.int().flatten(), last.to(device)
    sizes = model.heads, model.kv_heads, model.width, PAGE_SIZE
    if cell.decodes:
        # with groups of query heads, its tensor cores are what reads a KV head once
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=True
        )
        wrapper.plan(*pages, *sizes, q_data_type=cell.dtype, kv_data_type=cell.dtype)
    else:
        wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(each * cell.chunk, *pages, *sizes, causal=True, q_data_type=cell.dtype)
    return lambda layer: wrapper.run(layer.query, _paged(layer))


def sdpa_flash(case: Case) -> Attention:
    """torch's FlashAttention-2; its causal mask ends at the lower right."""

    def run(layer: Layer) -> Tensor:
        query, key, value = _heads_first(layer, case)
        attend = torch.ops.aten._scaled_dot_product_flash_attention
        found = attend(query, key, value, 0.0, not case.cell.decodes, scale=case.scale)[0]
        return _back(found, case)

    return run


def sdpa_cudnn(case: Case) -> Attention:
    """cuDNN's, for prefill: what is before the chunk, then the chunk, merged by log-sum-exp."""
    assert not case.cell.decodes, "it does not split a long context over programs"
    chunk, before = case.cell.chunk, case.cell.context - case.cell.chunk

    def part(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        attend = torch.ops.aten._scaled_dot_product_cudnn_attention
        found = attend(query, key, value, None, True, 0.0, causal, False, scale=case.scale)
        return found[0], found[1].view(*query.shape[:3], 1)

    def run(layer: Layer) -> Tensor:
        query, key, value = _heads_first(layer, case)
        own, mass = part(query, key[:, :, -chunk:], value[:, :, -chunk:], True)
        if before:
            rest, other = part(query, key[:, :, :before], value[:, :, :before], False)
            own = own + (rest - own) * (other - mass).sigmoid().to(own.dtype)
        return _back(own, case)

    return run


def sdpa(case: Case) -> Attention:
    """torch's on a CPU: for the dry run, no baseline of anything."""
    rows, context = case.cell.chunk, case.cell.context
    seen = torch.ones(rows, context, dtype=torch.bool).tril_(context - rows)

    def run(layer: Layer) -> Tensor:
        query, key, value = _heads_first(layer, case)
        mask = None if case.cell.decodes else seen
        found = scaled_dot_product_attention(
            query, key, value, mask, scale=case.scale, enable_gqa=True
        )
        return _back(found, case)

    return run


MAKERS: tuple[Maker, ...] = (
    flash_attention_3,
    flashinfer,
    flash_attention_2,
    sdpa_flash,
    sdpa_cudnn,
)


def usable(
    device: torch.device, chunk: int, wanted: list[str] | None, say: Callable[[str], None]
) -> Iterator[tuple[str, Maker]]:
    """Those that this machine has, and that give the right result on a small shape."""
    cuda = device.type == "cuda"
    model = Model("probe", 8, 2, 128 if cuda else 32)
    cell = Cell(model, torch.bfloat16 if cuda else torch.float32, 1024 if cuda else 256, 2, chunk)
    case = Case.make(cell, SparsePlan(), device, shuffled=False)
    expected = attend_exactly(case, case.layers[0])
    for maker in MAKERS if cuda else (sdpa,):
        if wanted is not None and maker.__name__ not in wanted:
            continue
        name = f"dense:{maker.__name__}"
        try:
            error = difference(maker(case)(case.layers[0]), expected)
        except ImportError:
            say(f"{name} is not installed")
        except Exception as error_:
            # whatever another library raises, it is not here to be measured
            say(f"{name} is left out: {_one_line(error_)}")
        else:
            if error <= LIMIT:
                yield name, maker
            else:
                say(f"{name} is left out: it is wrong by {error:.2g}")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"


def _paged(layer: Layer) -> tuple[Tensor, Tensor]:
    """[pages, 64, Hkv, D]."""
    key, value = (rows.unflatten(0, (-1, PAGE_SIZE)) for rows in (layer.kv.key, layer.kv.value))
    return key, value


def _in_order(layer: Layer, case: Case) -> list[Tensor]:
    """[B, T, Hkv, D]."""
    owners = 1 if case.shared else case.cell.batch
    found = (rows.unflatten(0, (owners, -1)) for rows in (layer.kv.key, layer.kv.value))
    return [rows[:, : case.cell.context].expand(case.cell.batch, -1, -1, -1) for rows in found]


def _by_request(query: Tensor, case: Case) -> Tensor:
    """[B, chunk, Hq, D]."""
    return query.unflatten(0, (case.cell.batch, case.cell.chunk))


def _heads_first(layer: Layer, case: Case) -> tuple[Any, ...]:
    """[B, heads, rows, D]; the heads of a group are the rows of a decode step."""
    key, value = (rows.transpose(1, 2) for rows in _in_order(layer, case))
    if case.cell.decodes:
        return layer.query.unflatten(1, (case.cell.model.kv_heads, -1)), key, value
    return _by_request(layer.query, case).transpose(1, 2), key, value


def _back(found: Tensor, case: Case) -> Tensor:
    """-> [T, Hq, D]."""
    if case.cell.decodes:
        return found.flatten(1, 2)
    return found.transpose(1, 2).flatten(0, 1)
