"""Prompts below the threshold, and layers that never prune, are SGLang's own backend's."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.model_executor.model_runner import ModelRunner


def sglangs_own(runner: ModelRunner) -> AttentionBackend:
    """The backend that SGLang would choose for this model and GPU: FlashAttention, FlashInfer."""
    from sglang.srt.arg_groups.model_override_base import get_default_attn_backend
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    name = get_default_attn_backend(runner.server_args, False, runner.model_config)
    return ATTENTION_BACKENDS[name](runner)
