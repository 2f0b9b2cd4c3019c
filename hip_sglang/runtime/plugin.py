"""The ``sglang.srt.plugins`` entry point: what makes ``--attention-backend hip_attention`` work.

SGLang logs a plugin's exception and starts without it. So ``load`` registers ``_guard`` before it
does anything that can fail, and what failed is raised from there, in front of the user.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from hip_sglang.runtime.requirements import (
    BACKEND,
    SUPPORTED_SGLANG,
    UnsupportedError,
    check_version,
)

# why this process cannot serve hip_attention, as lines for the operator
_problems: list[str] = []


def load() -> None:
    """Register the backend, its arguments and hooks; SGLang calls this once in each process."""
    import sglang.version

    try:
        check_version(sglang.version.__version__)
    except UnsupportedError as error:
        _report_unsupported(error)
        return
    _register_guard()
    try:
        _register()
    except Exception as error:
        _problems.append(f"hip_attention could not be loaded: {type(error).__name__}: {error}")
        raise


def _report_unsupported(error: UnsupportedError) -> None:
    """Say so at once at a command line; elsewhere when the backend is asked for."""
    # the flags of another version are not ours to parse, and ranks inherit this argv
    if any(word == BACKEND or word.endswith(f"={BACKEND}") for word in sys.argv):
        print(f"hip-sglang: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2)
    _problems.append(str(error))
    _register_guard()


def _register_guard() -> None:
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    register_resolution_hook("handle_missing_default_values")(_guard)


def _register() -> None:
    from sglang.srt.arg_groups.choices import add_attention_backend_choices
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.mem_cache.registry import register_radix_cache_backend

    from hip_sglang.runtime import compat

    add_attention_backend_choices([BACKEND])
    register_attention_backend(BACKEND)(build_backend)
    register_radix_cache_backend(BACKEND, build_tree)
    register_resolution_hook("handle_model_specific_adjustments")(_refuse_model)
    register_resolution_hook("handle_attention_backend_compatibility")(_settle)
    compat.install()


def _guard(server_args: Any, previous: Callable[[Any], None]) -> None:
    """The first step of SGLang's resolution that we take part in: refuse before much is done."""
    from hip_sglang.runtime import api_key, doors, requirements

    wanted = requirements.asks_for_backend(server_args)
    with doors.errors_for(server_args):
        api_key.settle_key(server_args)
        if wanted:
            check_loaded()
            requirements.check_arguments(server_args)
        elif hasattr(server_args, doors.CONFIG_ATTRIBUTE):
            raise UnsupportedError(
                f"--hip-config and --hip-preset need --attention-backend {BACKEND}; add it"
            )
    previous(server_args)
    from hip_sglang.runtime import host_platform, settings

    if wanted:
        with doors.errors_for(server_args):
            settings.require_host_platform(server_args)
    if host_platform.is_active():
        settings.settle_dtype(server_args)


def _refuse_model(server_args: Any, previous: Callable[[Any], None]) -> None:
    """The step in which SGLang asserts, for some models, which backends it knows: say it better."""
    from sglang.srt.arg_groups.overrides import model_config_of

    from hip_sglang.runtime import doors, requirements

    if requirements.asks_for_backend(server_args):
        model = model_config_of(server_args)
        with doors.errors_for(server_args):
            requirements.check_model(model, _attention_ranks(server_args))
        # transformers' word for no window is 0, and the one that sglang lets pass is None
        if getattr(model.hf_config, "sliding_window_pattern", None) == 0:
            model.hf_config.sliding_window_pattern = None
    previous(server_args)


def _settle(server_args: Any, previous: Callable[[Any], None]) -> None:
    """The step that settles SGLang's attention backend: the model is known by now."""
    from hip_sglang.runtime import doors, host_platform, requirements, settings

    previous(server_args)
    with doors.errors_for(server_args):
        if requirements.asks_for_backend(server_args):
            settings.settle_backend(server_args)
        if host_platform.is_active():
            settings.settle_host(server_args)


def _attention_ranks(server_args: Any) -> int:
    replicas = server_args.dp_size if server_args.enable_dp_attention else 1
    return int(server_args.tp_size // replicas)


def build_backend(runner: Any) -> Any:
    """SGLang's factory for the attention backend, called in each rank."""
    from hip_sglang.attention.backend import HipAttentionBackend
    from hip_sglang.runtime import doors, requirements

    # ranks do not repeat the resolution, and each has hooks of its own
    check_loaded()
    requirements.check_page_size(runner.page_size)
    requirements.check_kv_dtype(runner.kv_cache_dtype)
    requirements.check_layers(runner.model, runner.model_config.context_len)
    return HipAttentionBackend(runner, doors.config_of(runner.server_args))


def build_tree(ctx: Any) -> Any:
    """SGLang's factory for the radix tree, where prefixes are kept on disk."""
    from hip_sglang.kv.radix import build_tree

    return build_tree(ctx)


def check_loaded() -> None:
    """Raise what went wrong in ``load``, or in SGLang's applying of our hooks, in this process."""
    if _problems:
        raise UnsupportedError("; ".join(_problems))
    from hip_sglang.runtime import compat

    if missing := compat.missing():
        raise UnsupportedError(
            f"{', '.join(missing)} could not be hooked; {BACKEND} supports sglang "
            f"{SUPPORTED_SGLANG} as it was released: reinstall it"
        )
