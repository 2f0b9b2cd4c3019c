"""Where SGLang sizes and builds its KV pool: in host memory, when the configuration says so."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from hip_sglang.config import HipConfig
from hip_sglang.runtime import doors, requirements

if TYPE_CHECKING:
    from hip_sglang.kv.memory import MemoryPlan

logger = logging.getLogger(__name__)

# by SGLang's configurator, which has room for no attribute of ours
_plans: dict[int, MemoryPlan] = {}


def create_configurator(original: Callable[..., Any], kvc: Any) -> Any:
    """Around ``create_memory_pool_configurator``: capacity is what host memory holds."""
    if config_of(kvc) is None:
        return original(kvc)
    from sglang.srt.model_executor.pool_configurator import DefaultPoolConfigurator

    class HostPoolConfigurator(DefaultPoolConfigurator):  # type: ignore[misc]
        def calculate_pool_sizes(self, available_bytes: int, page_size: int) -> Any:
            plan = memory_plan(kvc, available_bytes)
            return self.calculate_pool_sizes_from_max_tokens(plan.logical_tokens, page_size)

        def finalize_with_max_running_requests(self, config: Any) -> Any:
            # what one decode step reads is on the device at once
            most = _plans[id(kvc)].running
            return replace(config, max_running_requests=min(config.max_running_requests, most))

    return HostPoolConfigurator(kvc)


def build_pool(original: Callable[..., Any], kvc: Any, **sizes: Any) -> Any:
    """Around the two builders of pools for plain attention."""
    config = config_of(kvc)
    if config is None:
        return original(kvc, **sizes)
    from sglang.srt.runtime_context import get_parallel

    from hip_sglang.kv.pool import OffloadedKVPool

    assert config.offload is not None
    tokens = sizes["max_total_num_tokens"]
    plan = _plans.pop(id(kvc))
    logger.info("hip_attention offload: %s", plan)
    parallel, layers = get_parallel(), kvc.layer_info
    return OffloadedKVPool(
        tokens,
        dtype=kvc.kv_cache_dtype,
        head_num=kvc.model_config.get_num_kv_heads(parallel.attn_tp_size, parallel.attn_dcp_size),
        head_dim=kvc.model_config.head_dim,
        v_head_dim=kvc.model_config.v_head_dim,
        layer_num=layers.num_effective_layers,
        start_layer=layers.start_layer,
        end_layer=layers.end_layer,
        device=kvc.device,
        device_tokens=min(plan.device_tokens, tokens),
        miss_policy=config.offload.miss_policy,
    )


def release_pages(original: Callable[..., None], allocator: Any, *pages: torch.Tensor) -> None:
    """Around ``PagedTokenToKVPoolAllocator._release_page_ids``: the device need not hold them."""
    original(allocator, *pages)
    pool = allocator.get_kvcache()
    if hasattr(pool, "forget"):
        pool.forget(torch.cat(pages))


def config_of(kvc: Any) -> HipConfig | None:
    """The configuration, where it offloads."""
    if kvc.is_draft_worker or not requirements.asks_for_backend(kvc.server_args):
        return None
    config = doors.config_of(kvc.server_args)
    return config if config.offload is not None else None


def memory_plan(kvc: Any, available_bytes: int) -> MemoryPlan:
    """What this rank may take; kept for ``build_pool``."""
    from sglang.srt.runtime_context import get_parallel, get_schedule

    from hip_sglang.kv.memory import GIB, KVShape, MemoryPlan

    config = doors.config_of(kvc.server_args)
    assert config.offload is not None
    parallel, args = get_parallel(), kvc.server_args
    model = kvc.model_config
    shape = KVShape(
        layers=kvc.layer_info.num_effective_layers,
        kv_heads=model.get_num_kv_heads(parallel.attn_tp_size, parallel.attn_dcp_size),
        head_dim=model.head_dim,
        value_dim=model.v_head_dim,
        itemsize=kvc.kv_cache_dtype.itemsize,
    )
    plan = _plans[id(kvc)] = MemoryPlan.of(
        shape,
        config,
        host_bytes=int(config.offload.host_gib * GIB) // ranks_of_machine(args),
        context=model.context_len,
        running=get_schedule().max_running_requests,
        # a CPU's "device" is the same memory, bounded
        device_bytes=None if kvc.device == "cpu" else available_bytes,
    )
    return plan


def ranks_of_machine(args: Any) -> int:
    """How many ranks share a machine's memory and disks."""
    replicas = 1 if args.enable_dp_attention else args.dp_size
    return int(-(-args.tp_size * args.pp_size * replicas // args.nnodes))
