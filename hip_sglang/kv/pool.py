"""The logical pool: SGLang sees room for all that host memory holds; the device caches pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from hip_kernels.layout import PAGE_SIZE
from hip_kernels.offloaded import MissPolicy, OffloadedKV
from hip_kernels.page_cache import Counts, PageCache
from sglang.srt.mem_cache.memory_pool import KVCache, unwrap_write_loc
from torch import Tensor

from hip_sglang.kv.host_store import host_pages
from hip_sglang.telemetry import Traffic

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention


class OffloadedKVPool(KVCache):  # type: ignore[misc]
    """SGLang's pool interface over host memory; only our backend can read it.

    Slot 0 .. 63 are SGLang's padding, as in its own pools.
    """

    def __init__(
        self,
        size: int,
        *,
        dtype: torch.dtype,
        head_num: int,
        head_dim: int,
        v_head_dim: int,
        layer_num: int,
        start_layer: int,
        end_layer: int,
        device: str,
        device_tokens: int,
        miss_policy: MissPolicy,
    ) -> None:
        """size: tokens in host memory; device_tokens: of these, on the device at a time."""
        super().__init__(
            size, PAGE_SIZE, dtype, layer_num, device, False, start_layer, end_layer, "Host"
        )
        self.miss_policy: MissPolicy = miss_policy
        pages = size // PAGE_SIZE + 1
        self.head_num, self.head_dim, self.v_head_dim = head_num, head_dim, v_head_dim
        self.hosts = [
            host_pages(pages, head_num, head_dim, v_head_dim, self.store_dtype, device)
            for _ in range(layer_num)
        ]
        self.caches = [PageCache.empty(device_tokens // PAGE_SIZE, h, device) for h in self.hosts]
        self._looked = [0] * len(Counts)
        self._written = 0
        self._finalize_allocation_log(size)

    def kv(self, layer_id: int, key_scale: float = 1.0, value_scale: float = 1.0) -> OffloadedKV:
        """One layer, by its global id, as our backend reads it."""
        number = layer_id - self.start_layer
        return OffloadedKV(
            self.hosts[number],
            self.caches[number],
            self.dtype,
            self.miss_policy,
            key_scale,
            value_scale,
        )

    def set_kv_buffer(
        self,
        layer: RadixAttention,
        loc_info: Any,
        cache_k: Tensor,
        cache_v: Tensor,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None:
        """Keys [T, Hkv, D] and values of the tokens at slots [T]."""
        slots = unwrap_write_loc(loc_info)[0]

        def stored(rows: Tensor, scale: Tensor | None) -> Tensor:
            if rows.dtype != self.dtype:
                # SGLang divides only what it casts
                rows = (rows if scale is None else rows / scale).to(self.dtype)
            return rows.view(self.store_dtype)

        kv = self.kv(layer.layer_id)
        kv.write(slots, stored(cache_k, k_scale), stored(cache_v, v_scale))

    def forget(self, pages: Tensor) -> None:
        """Pages [C] were freed."""
        for cache in self.caches:
            cache.forget(pages)

    def drop(self, pages: Tensor) -> None:
        """Pages [C] were read from elsewhere into host memory."""
        for cache in self.caches:
            cache.drop(pages)

    def count_written(self, tokens: int) -> None:
        """A pass writes so many tokens; a graph that is replayed cannot say so itself."""
        page_bytes = self.hosts[0].bytes_a_page * self.head_num * self.layer_num
        self._written += tokens * page_bytes // PAGE_SIZE

    def traffic(self) -> Traffic:
        """Since the last call; it waits for the device."""
        now = torch.stack([cache.counts for cache in self.caches]).sum(0).tolist()
        held = torch.stack([(cache.page >= 0).float().mean() for cache in self.caches])
        found = Traffic(
            [new - old for new, old in zip(now, self._looked, strict=True)],
            self.hosts[0].bytes_a_page,
            self._written,
            float(held.mean()),
        )
        self._looked, self._written = now, 0
        return found

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """Keys and values, in host memory."""
        keys = sum(host.key.numel() * host.rows.itemsize for host in self.hosts)
        return keys, sum(host.rows.nbytes for host in self.hosts) - keys

    def get_key_buffer(self, layer_id: int) -> NoReturn:
        """Refused: no tensor on the device holds all keys."""
        raise NotImplementedError(
            "KV is offloaded to host memory, and only hip_attention can read it there; switch "
            "off what asked for it, or serve without the configuration's offload"
        )

    get_value_buffer = get_key_buffer
    get_kv_buffer = get_key_buffer
