"""Models that are not served, as real configurations at the server's door."""

import pytest

from hip_sglang.runtime.torchvision_ops import declare_missing_operators

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "vocab_size": 512,
    "dtype": "float32",
}
# transformers' name, the architecture, and what its configuration says besides the sizes
LATENT = {
    "deepseek_v2": ("DeepseekV2ForCausalLM", {}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {}),
    "deepseek_v32": ("DeepseekV32ForCausalLM", {}),
    "glm4_moe_lite": ("Glm4MoeLiteForCausalLM", {}),
    "longcat_flash": ("LongcatFlashForCausalLM", {}),
}
SLIDING = {
    "gemma2": ("Gemma2ForCausalLM", {}),
    "gemma3_text": ("Gemma3ForCausalLM", {}),
    "gemma3n_text": ("Gemma3nForCausalLM", {}),
    "gemma4_text": ("Gemma4ForCausalLM", {}),
    "gpt_oss": ("GptOssForCausalLM", {}),
    "cohere2": ("Cohere2ForCausalLM", {}),
    "exaone4": ("Exaone4ForCausalLM", {"sliding_window": 4096}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 4096}),
    "olmo3": ("Olmo3ForCausalLM", {}),
    "phi3": ("Phi3ForCausalLM", {"sliding_window": 2047}),
    "starcoder2": ("Starcoder2ForCausalLM", {"sliding_window": 4096}),
    "afmoe": ("AfmoeForCausalLM", {}),
    "laguna": ("LagunaForCausalLM", {}),
    "mellum": ("MellumForCausalLM", {}),
}
RECURRENT = {
    "falcon_h1": ("FalconH1ForCausalLM", {}),
    "falcon_mamba": ("FalconMambaForCausalLM", {}),
    "granitemoehybrid": ("GraniteMoeHybridForCausalLM", {}),
    "lfm2": ("Lfm2ForCausalLM", {}),
    "mamba2": ("Mamba2ForCausalLM", {"num_heads": 8, "head_dim": 64}),
    "minimax": ("MiniMaxForCausalLM", {}),
    "nemotron_h": ("NemotronHForCausalLM", {}),
    "qwen3_5_text": ("Qwen3_5ForCausalLM", {}),
    "qwen3_next": ("Qwen3NextForCausalLM", {}),
}
# these name their sizes in other ways
ENCODER_DECODER = {
    "bart": ("BartForConditionalGeneration", {}),
    "mllama": ("MllamaForConditionalGeneration", {}),
    "t5": ("T5ForConditionalGeneration", {}),
    "whisper": ("WhisperForConditionalGeneration", {}),
}
CHUNKED = {
    "llama4": ("Llama4ForConditionalGeneration", {}),
    "llama4_text": ("Llama4ForCausalLM", {**SIZES, "attention_chunk_size": 2048}),
}
NOT_CAUSAL = {
    "bert": ("BertModel", {}),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", {}),
    # names that transformers lacks, on the configuration of a Llama
    "llama": ("SDARForCausalLM", {}),
}
# Grok says in two fields of its own what it does with logits
SCALED = {"llama": ("Grok1ForCausalLM", {**SIZES, "attn_temperature_len": 1024})}
CAPPED = {"llama": ("Grok1ForCausalLM", {**SIZES, "attn_logit_softcapping_method": "gelu"})}
OF_ITS_OWN = {"minimax_m3_vl": ("MiniMaxM3SparseForConditionalGeneration", {})}


def cases():
    for models, sizes, reason in (
        (LATENT, SIZES, "it uses latent attention (MLA)"),
        (SLIDING, SIZES, "it has sliding-window layers"),
        (RECURRENT, SIZES, "it has Mamba or linear-attention layers"),
        (ENCODER_DECODER, {}, "it is an encoder-decoder"),
        (CHUNKED, {}, "it attends in chunks"),
        (NOT_CAUSAL, SIZES, "its attention is not causal"),
        (SCALED, {}, "it scales its logits by position"),
        (CAPPED, {}, "it caps logits by gelu"),
        (OF_ITS_OWN, {}, "it has a sparse attention of its own"),
    ):
        for name, (architecture, more) in models.items():
            yield pytest.param(name, architecture, {**sizes, **more}, reason, id=architecture)


@pytest.mark.parametrize(("name", "architecture", "fields", "reason"), list(cases()))
def test_a_model_is_refused_in_one_line(
    sglang, tmp_path, capsys, name, architecture, fields, reason
):
    declare_missing_operators()
    from sglang.srt.server_args import prepare_server_args
    from transformers import AutoConfig

    config = AutoConfig.for_model(name, **fields)
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    argv = ["--model-path", str(tmp_path), "--attention-backend", "hip_attention"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        prepare_server_args(argv).resolve_once()
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    [line] = [line for line in said.splitlines() if line.startswith("hip-sglang: error: ")]
    # sglang serves Olmo 3 by its Olmo 2
    assert architecture.replace("Olmo3", "Olmo2") in line
    assert f"{reason}; choose another --attention-backend for it" in line


def test_a_context_within_the_window_or_chunk_is_served(sglang, tmp_path):
    declare_missing_operators()
    from sglang.srt.server_args import prepare_server_args
    from transformers import AutoConfig

    config = AutoConfig.for_model("mistral", **SIZES, sliding_window=4096)
    config.architectures = ["MistralForCausalLM"]
    config.save_pretrained(tmp_path)
    argv = ["--model-path", str(tmp_path), "--attention-backend", "hip_attention"]
    server_args = prepare_server_args([*argv, "--context-length", "4096"])
    server_args.resolve_once()
    assert server_args.resolved_dict()["attention_backend"] == "hip_attention"
