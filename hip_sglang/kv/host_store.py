"""Host memory for offloaded KV."""

from __future__ import annotations

import torch
from hip_kernels.layout import PAGE_SIZE
from hip_kernels.page_cache import HostPages


def host_pages(
    pages: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> HostPages:
    """Zeros for one layer; where the device is a GPU, pinned and mapped, so that kernels read them.

    On the memory node of the process that asks: SGLang binds each rank to that of its GPU.
    """
    if torch.device(device).type == "cpu":
        return HostPages.empty(pages, kv_heads, head_dim, value_dim, dtype)
    from sglang.srt.mem_cache.pool_host.common import HostTensorAllocator, alloc_with_host_register

    shape = pages, kv_heads, PAGE_SIZE * (head_dim + value_dim)
    # torch's own pinned memory comes in powers of two
    rows = alloc_with_host_register(shape, dtype, "cpu", True, HostTensorAllocator())
    return HostPages(rows.zero_(), head_dim, value_dim)
