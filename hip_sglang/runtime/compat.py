"""The one place that patches SGLang's internals: each symbol, and why no registry reaches it.

Written against SGLang 0.5.21. ``missing()`` says which targets are not patched, because SGLang
logs and forgets a hook that fails; the resolution step and every rank's backend factory ask it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hip_sglang.runtime import (
    chunks,
    doors,
    drain,
    host_platform,
    mixed,
    offload,
    request_checks,
)


@dataclass(frozen=True)
class Hook:
    """An AROUND hook: ``hook(original, *args, **kwargs)`` in place of the symbol ``target``."""

    target: str
    hook: Callable[..., Any]
    why: str


def _support_triton(original: Callable[[str], bool], backend: str) -> bool:
    return not host_platform.is_active() and original(backend)


def _get_last_loc(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not host_platform.is_active():
        return original(*args, **kwargs)
    from sglang.srt.mem_cache.allocation import get_last_loc_torch

    return get_last_loc_torch(*args, **kwargs)


HOOKS = (
    Hook(
        "sglang.srt.server_args.ServerArgs.add_cli_args",
        doors.add_cli_args,
        "ServerArgs is a generated struct: --hip-config and --hip-preset cannot be fields of it",
    ),
    Hook(
        "sglang.srt.server_args.ServerArgs.from_cli_args",
        doors.from_cli_args,
        "copies known fields only, so the values of our flags would be lost",
    ),
    Hook(
        "sglang.srt.utils.common.support_triton",
        _support_triton,
        "names two backends that go without Triton; without an accelerator none can launch it",
    ),
    Hook(
        "sglang.srt.mem_cache.allocation.get_last_loc",
        _get_last_loc,
        "chooses a Triton kernel by the backend's name, with a list of its own",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
        request_checks.validate_one_request,
        "lets token ids through that no row of the embedding has, and the scheduler dies of them",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.set_server_stop_hook",
        drain.set_server_stop_hook,
        "answers new requests after SIGTERM, and has no list of middleware that plugins may add to",
    ),
    Hook(
        "sglang.srt.managers.schedule_policy.PrefillAdder.__init__",
        chunks.init_adder,
        "takes decode steps off a chunk by the token, and aligns it for sharded KV only",
    ),
    Hook(
        "sglang.srt.mem_cache.prefill_budget.PrefillBudget.available_chunk_tokens",
        chunks.available_chunk_tokens,
        "cuts a chunk to what memory has left, by the token",
    ),
    Hook(
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
        mixed.init_new,
        "drops which requests of a mixed batch are decode steps, and its runner the mode itself",
    ),
    Hook(
        "sglang.srt.model_executor.pool_configurator.create_memory_pool_configurator",
        offload.create_configurator,
        "sizes the pool by the device's memory, and offloaded KV is in the host's",
    ),
    Hook(
        "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_mha_kv_pool",
        offload.build_pool,
        "has no registry of pools",
    ),
    Hook(
        "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_oot_mha_kv_pool",
        offload.build_pool,
        "asks the platform for a class, and passes it too little",
    ),
    Hook(
        "sglang.srt.mem_cache.allocator.paged.PagedTokenToKVPoolAllocator._release_page_ids",
        offload.release_pages,
        "tells nobody which pages are free again",
    ),
)


def install() -> None:
    """Register every hook; SGLang applies them when all plugins are loaded."""
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for hook in HOOKS:
        HookRegistry.register(hook.target, hook.hook, HookType.AROUND)
    if not hasattr(Engine, "server_args_class"):
        raise AttributeError("sglang.srt.entrypoints.engine.Engine.server_args_class is gone")
    # an override point of Engine's own, so that sgl.Engine(hip_config=...) is understood
    Engine.server_args_class = staticmethod(doors.engine_server_args)


def missing() -> list[str]:
    """The targets that are not patched in this process."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    return [hook.target for hook in HOOKS if hook.target not in HookRegistry._patched]
