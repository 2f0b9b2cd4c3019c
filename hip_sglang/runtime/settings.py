"""What hip_attention, and a machine without an accelerator, decide about SGLang's arguments.

``plugin.py`` calls these from two steps of SGLang's resolution: when the device is known, and when
the model and the attention backend are.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from hip_kernels.layout import NODE_PAGES, PAGE_SIZE, SUB_PAGES, WIDEST_OF_BLOCKS
from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolving_view

from hip_sglang.config import Disk, HipConfig
from hip_sglang.kv.disk_place import kept_in
from hip_sglang.kv.memory import GIB
from hip_sglang.runtime import doors, host_platform
from hip_sglang.runtime.requirements import BACKEND, UnsupportedError

MAX_RUNNING_REQUESTS = 256
MAX_RUNNING_REQUESTS_CPU = 16
# req_to_token has one int32 per running request and position of the context
REQ_TO_TOKEN_BYTES = 1 << 30
# of the memory that is free beside the weights: the rest is for activations and for others
KV_SHARE_OF_FREE_MEMORY = 1 / 3
# a CPU host's pool is cleared at start, so it is no larger than a few of the longest contexts
FULL_CONTEXTS_ON_CPU = 4
# beside 64 keys and 64 values, a page has its sub-page means, one sigma and one mean value; a node
# has as many
SUMMARY_SHARE_OF_KV = (SUB_PAGES + 2 + 3 / NODE_PAGES) / (2 * PAGE_SIZE)


def require_host_platform(server_args: Any) -> None:
    """Refuse hip_attention on a CPU where our platform is switched off."""
    if resolving_view(server_args).device == "cpu" and not host_platform.is_active():
        raise UnsupportedError(
            f"{BACKEND} on --device cpu needs the platform that comes with it, which is not "
            "active; unset SGLANG_USE_CPU_ENGINE, SGLANG_PLATFORM and SGLANG_PLUGINS, on a "
            "machine without an accelerator"
        )


def settle_dtype(server_args: Any) -> None:
    """On our CPU platform: float32 weights stay float32, which a CPU computes faster than halves.

    SGLang's ``--dtype auto`` would make them float16. It must be known before anything asks for
    the model's configuration, which is built once.
    """
    from sglang.srt.configs.model_config import ModelConfig

    if resolving_view(server_args).dtype == "auto":
        stored = ModelConfig.from_server_args(server_args).hf_text_config.dtype
        if stored == torch.float32:
            declare_resolution(server_args, BACKEND, dtype="float32")


def settle_host(server_args: Any) -> None:
    """On our CPU platform, for every backend: token capacity by free memory, cores by rank."""
    cfg = resolving_view(server_args)
    ranks = cfg.tp_size * cfg.pp_size * _replicas(cfg)
    if ranks > 1:
        os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", _processors_by_rank(ranks))
    if cfg.max_running_requests is None:
        declare_resolution(server_args, BACKEND, max_running_requests=_running_requests(cfg))
    # a fraction given by the user says how much memory to take; then we say nothing
    if doors.config_of(server_args).offload is not None:
        return
    if cfg.max_total_tokens is None and server_args.mem_fraction_static is None:
        declare_resolution(server_args, BACKEND, max_total_tokens=_host_tokens(server_args))


def settle_backend(server_args: Any) -> None:
    """For hip_attention: its page size, and no more request rows than a long context allows."""
    cfg = resolving_view(server_args)
    layers = model_config_of(cfg).num_hidden_layers
    named = doors.config_of(server_args).named_layers
    if absent := [(key, layer) for key, layer in named if layer >= layers]:
        key, layer = absent[0]
        raise UnsupportedError(
            f"{key} names layer {layer}, but this model's are 0 to {layers - 1}; take it out"
        )
    declare_resolution(server_args, BACKEND, page_size=PAGE_SIZE)
    if cfg.max_running_requests is None:
        declare_resolution(server_args, BACKEND, max_running_requests=_running_requests(cfg))
    _check_offload(doors.config_of(server_args), cfg)
    _settle_disk(server_args)
    if cfg.device == "cpu" or not doors.config_of(server_args).captures:
        _disable_graphs(server_args)
    elif cfg.cuda_graph_config.prefill.backend == "full":
        raise UnsupportedError(
            f"{BACKEND} plans prompts on the host, which --cuda-graph-backend-prefill full cannot "
            "hold; leave it out, or use breakable"
        )
    offloads = doors.config_of(server_args).offload is not None
    # the logical pool reckons with its summaries itself
    if cfg.device != "cpu" and server_args.mem_fraction_static is None and not offloads:
        # SGLang fills its share with KV and knows nothing of the summaries beside it
        fp8 = cfg.kv_cache_dtype.startswith("fp8")
        # summaries stay in half precision
        share = cfg.mem_fraction_static / (1 + SUMMARY_SHARE_OF_KV * (2 if fp8 else 1))
        declare_resolution(server_args, BACKEND, mem_fraction_static=round(share, 3))


def _disable_graphs(server_args: Any) -> None:
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

    config = resolving_view(server_args).cuda_graph_config
    for phase in Phase.ALL:
        config = with_phase(config, phase, backend=Backend.DISABLED)
    declare_resolution(server_args, BACKEND, cuda_graph_config=config)


def _running_requests(cfg: Any) -> int:
    most = MAX_RUNNING_REQUESTS_CPU if cfg.device == "cpu" else MAX_RUNNING_REQUESTS
    row_bytes = 4 * model_config_of(cfg).context_len
    return int(max(1, min(most, REQ_TO_TOKEN_BYTES // row_bytes)))


def _check_offload(config: HipConfig, cfg: Any) -> None:
    """Refuse more host memory than there is, and a device too small for one query."""
    if config.offload is None:
        return
    free, asked = _free_memory(), config.offload.host_gib
    if asked * GIB > free:
        raise UnsupportedError(
            f"offload.host_gib={asked:g} is more than the {free / GIB:.1f} GiB of host memory that "
            "are free here, by the container's limit where there is one; lower it"
        )
    if cfg.device != "cpu" and not (config.has_kernels and _widest(cfg) <= WIDEST_OF_BLOCKS):
        raise UnsupportedError(
            "offload on a GPU is for what kernels do: a remainder of none, mean, quadratic or "
            f"harmonic, and heads of up to {WIDEST_OF_BLOCKS} channels; leave offload out, or use "
            "those"
        )
    needed, tokens = config.step_pages * PAGE_SIZE, config.offload.device_tokens
    if tokens is not None and tokens < needed:
        raise UnsupportedError(
            f"offload.device_tokens={tokens} is too small: one query reads up to {needed:,} tokens "
            "exactly (the larger of dense_threshold and sink + window + budget + its own page); "
            f"set it to {needed} or more, or lower those"
        )


def _settle_disk(server_args: Any) -> None:
    """Where prefixes are kept on disk: SGLang's tree is ours, and asks what was written."""
    offload = doors.config_of(server_args).offload
    if offload is None or offload.disk is None:
        return
    _check_disk(offload.disk, resolving_view(server_args))
    declare_resolution(
        server_args,
        BACKEND,
        radix_cache_backend=BACKEND,
        # the scheduler asks only then what was written
        enable_unified_cache_external_linker=True,
    )


def _check_disk(disk: Disk, cfg: Any) -> None:
    """Refuse more than the disk has, and what it cannot be used with."""
    for given, flag in (
        (cfg.disable_radix_cache, "--disable-radix-cache"),
        (cfg.radix_cache_backend not in (None, BACKEND), "--radix-cache-backend"),
        # SGLang's stages do not agree on what such a store holds
        (cfg.pp_size > 1, "--pp-size"),
    ):
        if given:
            raise UnsupportedError(
                f"offload.disk keeps what SGLang's radix cache holds, and cannot with {flag}; "
                "leave one of the two out"
            )
    room = _room_on_disk(disk.path)
    if room is not None and disk.gib * GIB > room:
        raise UnsupportedError(
            f"offload.disk.gib={disk.gib:g} is more than the {room / GIB:.1f} GiB that {disk.path} "
            "holds already or has free; lower it, or free some"
        )


def _room_on_disk(path: Path) -> int | None:
    """Bytes that are free where this directory is, or will be made, and what prefixes take there.

    None where the file system does not say.
    """
    try:
        held = sum(kept.nbytes for kept in kept_in(path))
        made = next(place for place in (path, *path.absolute().parents) if place.exists())
        usage = shutil.disk_usage(made)
    except PermissionError:  # each rank says so when it opens it
        return None
    return usage.free + held if usage.total else None


def _widest(cfg: Any) -> int:
    model = model_config_of(cfg)
    return int(max(model.head_dim, model.v_head_dim))


def _replicas(cfg: Any) -> int:
    """How many copies of weights and KV there are: with DP attention the ranks share one."""
    return 1 if cfg.enable_dp_attention else int(cfg.dp_size)


def _processors_by_rank(ranks: int) -> str:
    """SGLang's notation: "0,1|2,3" gives two processors to each of two ranks."""
    processors = host_platform.processors()
    share = max(1, len(processors) // ranks)
    # with fewer processors than ranks some share one
    groups = [
        [processors[(rank * share + core) % len(processors)] for core in range(share)]
        for rank in range(ranks)
    ]
    return "|".join(",".join(map(str, group)) for group in groups)


def _host_tokens(server_args: Any) -> int:
    """How many tokens of KV this machine, or the container we are in, has room for."""
    cfg = resolving_view(server_args)
    model = model_config_of(server_args)
    free = _free_memory() // _replicas(cfg) - _checkpoint_bytes(cfg.model_path)
    room = int(max(0, free) * KV_SHARE_OF_FREE_MEMORY / _kv_bytes_per_token(model))
    enough = FULL_CONTEXTS_ON_CPU * int(model.context_len)
    tokens = min(room, enough) // PAGE_SIZE * PAGE_SIZE
    if room < min(cfg.chunked_prefill_size, enough):
        raise UnsupportedError(
            f"free memory has room for {tokens:,} tokens of KV beside the weights, less than one "
            f"prefill chunk of {cfg.chunked_prefill_size:,}; free some, or set --max-total-tokens"
        )
    return tokens


def _free_memory() -> int:
    from sglang.srt.mem_cache.host_memory import available_host_memory_bytes
    from sglang.srt.platforms import current_platform

    try:
        return int(available_host_memory_bytes())
    except (OSError, RuntimeError, ValueError):
        # it is strict about cgroups that are mounted in unusual ways
        return int(current_platform.get_available_memory()[0])


def _kv_bytes_per_token(model: Any) -> int:
    values = model.get_total_num_kv_heads() * (model.head_dim + model.v_head_dim)
    return int(model.num_hidden_layers * values * model.dtype.itemsize)


def _checkpoint_bytes(model_path: str) -> int:
    """Size of the weights on disk; nothing is known of a model that is yet to be downloaded."""
    return sum(file.stat().st_size for file in Path(model_path).glob("*.safetensors"))
