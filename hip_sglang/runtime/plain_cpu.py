"""The platform class that ``host_platform.activate`` names. SGLang imports it when it is ready."""

from __future__ import annotations

import os
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from hip_sglang.runtime.host_platform import processors


class PlainCpuPlatform(CpuDeviceMixin, SRTPlatform):  # type: ignore[misc]
    """A plain CPU: torch operators, gloo, no graphs."""

    _enum = PlatformEnum.OOT

    def get_device(self, device_id: int | None = None) -> str:
        """Always "cpu"; SGLang's default for ``--device`` asks here."""
        return "cpu"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Defaults for every attention backend on this machine; what the user gave stays."""
        # results of a step are ready when it returns, so there is nothing to overlap with
        server_args.disable_overlap_schedule = True
        if server_args.chunked_prefill_size is None:
            server_args.chunked_prefill_size = 4096
        if server_args.mem_fraction_static is None:
            # SGLang's default is made for GPUs; the token capacity is what limits us
            server_args.mem_fraction_static = 0.9

    def get_default_attention_backend(self) -> str:
        """SGLang's backend in plain torch."""
        return "torch_native"

    def get_mha_kv_pool_cls(self) -> type:
        """SGLang's own pool."""
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool  # type: ignore[no-any-return]

    def get_paged_allocator_cls(self) -> type:
        """SGLang's paged allocator, in torch."""
        from hip_sglang.runtime.allocator import HostPagedAllocator

        return HostPagedAllocator

    def init_backend(self) -> None:
        """Give each tensor-parallel rank its share of the processors."""
        ranks = len(os.environ.get("SGLANG_CPU_OMP_THREADS_BIND", "all").split("|"))
        if ranks > 1:
            torch.set_num_threads(max(1, len(processors()) // ranks))
