"""Which models are refused, by real configurations as SGLang reads them."""

import json

import pytest
import torch

from hip_sglang.runtime.requirements import (
    UnsupportedError,
    check_kv_dtype,
    check_layers,
    check_model,
)

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "vocab_size": 1024,
    "torch_dtype": "bfloat16",
}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}
GEMMA = {
    **LLAMA,
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "head_dim": 64,
    "sliding_window": 1024,
}
DEEPSEEK = {
    **LLAMA,
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
QWEN3_NEXT = {
    **LLAMA,
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "head_dim": 64,
}
# 13B and larger; sglang knows the 7B without ALiBi by its hidden size
BAICHUAN = {**LLAMA, "architectures": ["BaichuanForCausalLM"]}
WHISPER = {
    "architectures": ["WhisperForConditionalGeneration"],
    "model_type": "whisper",
    "d_model": 256,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_target_positions": 448,
    "torch_dtype": "float32",
}


@pytest.fixture
def read(sglang, tmp_path):
    """SGLang's ``ModelConfig`` of a directory with nothing but this configuration."""
    from sglang.srt.configs.model_config import ModelConfig

    def read(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return ModelConfig(str(tmp_path))

    return read


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        QWEN2,
        {**QWEN2, "use_sliding_window": False, "sliding_window": 1024},
        {**MISTRAL, "sliding_window": None},
        {**MISTRAL, "sliding_window": 4096},
        {**BAICHUAN, "hidden_size": 4096},
    ],
    ids=["llama", "qwen2", "qwen2 window unused", "mistral", "window as long as the context", "7B"],
)
def test_grouped_query_attention_is_served(read, config):
    check_model(read(config), ranks=2)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (DEEPSEEK, "latent attention"),
        ({**MISTRAL, "sliding_window": 1024}, "sliding-window layers"),
        (GEMMA, "sliding-window layers"),
        (QWEN3_NEXT, "Mamba or linear-attention layers"),
        (WHISPER, "encoder-decoder"),
        (BAICHUAN, "ALiBi"),
    ],
    ids=["mla", "mistral", "gemma2", "hybrid", "encoder-decoder", "alibi"],
)
def test_other_attention_is_refused_by_name(read, config, reason):
    with pytest.raises(UnsupportedError) as refused:
        check_model(read(config), ranks=1)
    assert reason in str(refused.value)
    assert config["architectures"][0] in str(refused.value)


def test_a_kv_head_is_not_split_over_ranks(read):
    with pytest.raises(UnsupportedError, match="use --tp-size 2 or less"):
        check_model(read(LLAMA), ranks=4)


def test_a_kv_cache_that_is_not_made_of_floats_is_refused():
    check_kv_dtype(torch.bfloat16)
    check_kv_dtype(torch.float8_e4m3fn)
    with pytest.raises(UnsupportedError, match="set --kv-cache-dtype bfloat16"):
        check_kv_dtype(torch.uint8)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"logit_cap": 50.0, "logit_capping_method": "odd"}, "layer 3 caps its logits by odd"),
        ({"sliding_window_size": 1023}, "layer 3 slides a window"),
        ({"is_cross_attention": True}, "layer 3 attends across sequences"),
    ],
)
def test_a_layer_that_asks_for_more_is_refused(sglang, arguments, reason):
    from sglang.srt.layers.radix_attention import RadixAttention

    def model(**given):
        layer = RadixAttention(4, 64, 0.125, num_kv_heads=2, layer_id=3, **given)
        return torch.nn.ModuleList([layer])

    check_layers(model(sliding_window_size=4096, logit_cap=30.0), context=4096)
    with pytest.raises(UnsupportedError, match=reason):
        check_layers(model(**arguments), context=4096)
