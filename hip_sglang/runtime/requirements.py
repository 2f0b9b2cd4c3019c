"""What hip_attention refuses at start: one line each, with the reason and an alternative."""

from __future__ import annotations

from typing import Any

import torch
from hip_kernels.layout import PAGE_SIZE
from hip_kernels.page_size import VARIABLE

BACKEND = "hip_attention"
SUPPORTED_SGLANG = "0.5.21"
# kinds of layers, in the words of transformers' `layer_types`
NOT_ATTENTION = {"mamba", "linear_attention", "conv", "hybrid"}
# architectures whose configuration does not tell: encoders, diffusion language models
NOT_CAUSAL = {
    "BertForSequenceClassification",
    "BertModel",
    "Contriever",
    "DiffusionGemmaForBlockDiffusion",
    "HrmTextForCausalLM",
    "LLaDA2MoeModelLM",
    "SDARForCausalLM",
    "SDARMoeForCausalLM",
    "XLMRobertaForSequenceClassification",
    "XLMRobertaModel",
}


class UnsupportedError(ValueError):
    """A combination that hip_attention does not serve; its message is one line for the operator."""


def asks_for_backend(args: Any) -> bool:
    """Whether either phase is to be served by hip_attention."""
    return BACKEND in (
        args.attention_backend,
        args.prefill_attention_backend,
        args.decode_attention_backend,
    )


def check_version(version: str) -> None:
    """Refuse every SGLang but the one whose internals this package was written against."""
    # a local suffix (0.5.21+cpu) names a build, not another release
    if version.split("+")[0] != SUPPORTED_SGLANG:
        raise UnsupportedError(
            f"sglang {version} is installed, but {BACKEND} supports {SUPPORTED_SGLANG} only; "
            f"pip install sglang=={SUPPORTED_SGLANG}, or choose another --attention-backend"
        )


def check_arguments(args: Any) -> None:
    """Refuse what the server arguments alone show to be impossible."""
    for unsupported, what, remedy in _refused_features(args):
        if unsupported:
            raise UnsupportedError(f"{BACKEND} does not support {what}; {remedy}")
    prefill = args.prefill_attention_backend or args.attention_backend
    decode = args.decode_attention_backend or args.attention_backend
    if {prefill, decode} != {BACKEND}:
        raise UnsupportedError(
            f"{BACKEND} must serve both phases, not prefill={prefill} with decode={decode}: they "
            f"share its page summaries; give --attention-backend {BACKEND}, and --hip-preset "
            "quality for dense prefill"
        )
    if args.page_size is not None:
        check_page_size(args.page_size)


def check_page_size(given: int) -> None:
    """Refuse pages that are not this process's: a rank's machine may say otherwise."""
    if given != PAGE_SIZE:
        raise UnsupportedError(
            f"{BACKEND} works in pages of {PAGE_SIZE} tokens here, not --page-size {given}; leave "
            f"--page-size out, and give {VARIABLE} (16, 32 or 64) to all processes"
        )


def _refused_features(args: Any) -> list[tuple[bool, str, str]]:
    """Each as (asked for, what it is, what to do instead)."""
    from sglang.srt.environ import envs

    return [
        (
            args.speculative_algorithm is not None,
            f"speculative decoding (--speculative-algorithm {args.speculative_algorithm})",
            "leave it out",
        ),
        (
            args.enable_hierarchical_cache,
            "HiCache (--enable-hierarchical-cache)",
            "leave it out",
        ),
        (
            args.enable_lmcache or args.enable_flexkv or args.enable_unified_cache_external_linker,
            "another KV cache store (--enable-lmcache, --enable-flexkv, "
            "--enable-unified-cache-external-linker)",
            "leave it out; offload.disk in --hip-config keeps prefixes",
        ),
        (
            args.disaggregation_mode != "null",
            f"PD disaggregation (--disaggregation-mode {args.disaggregation_mode})",
            "serve both phases in one process",
        ),
        (
            args.dcp_size > 1 or args.attn_cp_size > 1 or args.enable_prefill_cp,
            "context parallelism (--dcp-size, --attn-cp-size, --enable-prefill-cp)",
            "use --tp-size, up to the model's number of KV heads",
        ),
        (
            args.dllm_algorithm is not None,
            f"diffusion language models (--dllm-algorithm {args.dllm_algorithm})",
            "choose another --attention-backend",
        ),
        (args.enable_hisparse, "HiSparse (--enable-hisparse)", "choose one of the two"),
        (
            args.enable_two_batch_overlap or args.enable_pdmux,
            "several attention backends side by side (--enable-two-batch-overlap, --enable-pdmux)",
            "leave it out",
        ),
        (
            envs.SGLANG_ENABLE_METADATA_GLUE_GRAPH.get(),
            "graphs of metadata (SGLANG_ENABLE_METADATA_GLUE_GRAPH): it finds nodes on the host",
            "unset that variable",
        ),
        (
            args.kv_cache_dtype not in ("auto", "bf16", "bfloat16", "fp8_e4m3", "fp8_e5m2"),
            f"--kv-cache-dtype {args.kv_cache_dtype}",
            "use auto, bfloat16, fp8_e4m3 or fp8_e5m2",
        ),
        (
            args.chunked_prefill_size is not None
            and args.chunked_prefill_size % PAGE_SIZE > 0
            # -1 is sglang's word for "no chunks"
            and args.chunked_prefill_size > 0,
            f"--chunked-prefill-size {args.chunked_prefill_size}",
            f"use a multiple of {PAGE_SIZE}",
        ),
    ]


def check_model(model: Any, ranks: int) -> None:
    """Refuse what the model's configuration (sglang's ``ModelConfig``) shows to be impossible.

    ``ranks`` is over how many ranks its attention heads are split.
    """
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.configs.model_config import AttentionArch, is_minimax_sparse

    name = (model.hf_config.architectures or ["this model"])[0]
    mamba = (
        mambaish_config(model) is not None
        or model.attention_arch == AttentionArch.SSM
        # served by transformers' own code, which sglang's list does not know
        or not NOT_ATTENTION.isdisjoint(getattr(model.hf_text_config, "layer_types", None) or ())
    )
    # grok's word for the function that caps its logits
    capping = getattr(model.hf_text_config, "attn_logit_softcapping_method", None)
    for unsupported, why in (
        (mamba, "it has Mamba or linear-attention layers"),
        (not mamba and model.attention_arch != AttentionArch.MHA, "it uses latent attention (MLA)"),
        # sglang's own word is about three architectures only
        (
            model.is_encoder_decoder or getattr(model.hf_config, "is_encoder_decoder", False),
            "it is an encoder-decoder",
        ),
        (is_minimax_sparse(model.hf_config), "it has a sparse attention of its own"),
        (name in NOT_CAUSAL, "its attention is not causal"),
        (capping not in (None, "tanh"), f"it caps logits by {capping}"),
        (
            getattr(model.hf_text_config, "attn_temperature_len", -1) > 0,
            "it scales its logits by position",
        ),
        (getattr(model, "use_alibi", False), "it biases its logits by distance (ALiBi)"),
        (0 < (model.attention_chunk_size or 0) < model.context_len, "it attends in chunks"),
        (_slides(model), "it has sliding-window layers"),
    ):
        if unsupported:
            raise UnsupportedError(
                f"{BACKEND} does not serve {name}: {why}; choose another --attention-backend for it"
            )
    kv_heads = model.get_total_num_kv_heads()
    if ranks > kv_heads:
        raise UnsupportedError(
            f"--tp-size {ranks} is more than the {kv_heads} KV heads of {name}: {BACKEND} "
            f"selects pages per KV head and cannot split one; use --tp-size {kv_heads} or less"
        )


def check_layers(model: torch.nn.Module, context: int) -> None:
    """Refuse what only the built model shows: what one of its attention layers asks for."""
    from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

    for layer in model.modules():
        if not isinstance(layer, RadixAttention):
            continue
        for unsupported, what in (
            (0 < layer.sliding_window_size < context, "slides a window"),
            (layer.is_cross_attention, "attends across sequences"),
            (layer.attn_type != AttentionType.DECODER, "is not causal"),
            (
                layer.logit_cap > 0 and layer.logit_capping_method != "tanh",
                f"caps its logits by {layer.logit_capping_method}",
            ),
            (layer.xai_temperature_len > 0, "scales its logits by position"),
        ):
            if unsupported:
                raise UnsupportedError(
                    f"{BACKEND} does not serve this model: attention layer {layer.layer_id} "
                    f"{what}; choose another --attention-backend for it"
                )


def check_kv_dtype(dtype: torch.dtype) -> None:
    """Refuse a KV cache in a format that only its checkpoint asked for."""
    known = (torch.float8_e4m3fn, torch.float8_e5m2)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16, *known):
        raise UnsupportedError(
            f"{BACKEND} does not support a KV cache in {dtype}, which this checkpoint asks for; "
            "set --kv-cache-dtype bfloat16"
        )


def _slides(model: Any) -> bool:
    if model.is_hybrid_swa:
        return True
    # qwen2 and its relatives carry a window that this switch leaves unused
    if not getattr(model.hf_text_config, "use_sliding_window", True):
        return False
    return bool(0 < (model.sliding_window_size or 0) < model.context_len)
