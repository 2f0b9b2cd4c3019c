"""Tiny random models of many architectures, written by transformers itself."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hip_sglang.runtime.torchvision_ops import declare_missing_operators

VOCABULARY = 512
CONTEXT = 4096


@dataclass(frozen=True)
class Architecture:
    """One architecture: transformers' name for it, and the heads of the tiny model."""

    model_type: str
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    more: dict[str, Any] = field(default_factory=dict)
    # what transformers calls the fields where it has names of its own
    names: dict[str, str] = field(default_factory=dict)
    # what published checkpoints call the architecture where transformers writes another name
    published_as: str = ""
    # both compute in float32, and add up in different orders
    tolerance: float = 1e-4
    # the mean error of pruned positions, in nats; without summaries qwen2's and qwen3's double
    near: float = 0.15

    def config(self) -> Any:
        """The configuration, as transformers reads it from a model directory."""
        hidden = self.heads * self.head_dim
        fields = {
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": 2,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": CONTEXT,
            "vocab_size": VOCABULARY,
            "initializer_range": hidden**-0.5,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 0,
            "pad_token_id": None,
            "dtype": "float32",
        }
        named = {self.names.get(name, name): value for name, value in fields.items()}
        return transformers().AutoConfig.for_model(self.model_type, **(named | self.more))


GPT2_NAMES = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}

# SGLang ties these, whatever the configuration says
TIED = {"tie_word_embeddings": True}

# fields that not every configuration has must not be invented: SGLang reads them all
ARCHITECTURES = {
    "llama": Architecture("llama", head_dim=96),
    "qwen2": Architecture("qwen2", heads=6, kv_heads=1),
    "qwen3": Architecture("qwen3", more={"head_dim": 128}),
    "mistral": Architecture("mistral", more={"sliding_window": None, "head_dim": 80}, head_dim=80),
    "phi": Architecture(
        "phi",
        kv_heads=4,
        head_dim=80,
        more={"partial_rotary_factor": 0.4, "intermediate_size": 4 * 320},
    ),
    "phi3": Architecture("phi3", head_dim=96, more={"sliding_window": None}),
    # sglang computes the exact GELU, whatever the configuration says
    "gemma": Architecture(
        "gemma",
        heads=2,
        kv_heads=1,
        head_dim=256,
        more={"head_dim": 256, "hidden_act": "gelu", **TIED},
    ),
    "gpt2": Architecture("gpt2", kv_heads=4, names=GPT2_NAMES, more=TIED, near=0.2),
    "gpt_bigcode": Architecture("gpt_bigcode", kv_heads=1, names=GPT2_NAMES, more=TIED),
    "gptj": Architecture("gptj", kv_heads=4, names=GPT2_NAMES, more={"rotary_dim": 32}),
    "gpt_neox": Architecture("gpt_neox", kv_heads=4),
    "opt": Architecture(
        "opt",
        kv_heads=4,
        names={"intermediate_size": "ffn_dim"},
        more={"word_embed_proj_dim": 256},
    ),
    "stablelm": Architecture("stablelm", head_dim=80, more={"partial_rotary_factor": 0.25}),
    "olmo": Architecture("olmo", kv_heads=4),
    # its norms come after attention, and enlarge what is wrong; without summaries it is 0.49
    "olmo2": Architecture("olmo2", near=0.35),
    "granite": Architecture(
        "granite",
        more={
            "attention_multiplier": 0.1,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
    ),
    "starcoder2": Architecture("starcoder2", more={"sliding_window": None}),
    "cohere": Architecture("cohere", more=TIED),
    "glm4": Architecture("glm4", more={"head_dim": 64}, near=0.25),
    "ernie4_5": Architecture("ernie4_5", more={"head_dim": 64}),
    "arcee": Architecture("arcee"),
    # sglang computes a part of its activation in bfloat16
    "apertus": Architecture("apertus", tolerance=1e-2),
    "persimmon": Architecture("persimmon", kv_heads=4),
    "hunyuan_v1_dense": Architecture(
        "hunyuan_v1_dense", more={"head_dim": 64, "use_qk_norm": True}
    ),
    "ministral3": Architecture("ministral3", near=0.2),
    "smollm3": Architecture("smollm3"),
    "seed_oss": Architecture("seed_oss", more={"head_dim": 64}),
    "exaone4": Architecture(
        "exaone4",
        more={
            "sliding_window": None,
            "layer_types": ["full_attention"] * 2,
            # the only one that sglang knows
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        near=0.3,
    ),
    # by transformers' own code inside SGLang
    "helium": Architecture("helium", more={"head_dim": 64}),
    "olmoe": Architecture("olmoe", kv_heads=4, more={"num_experts": 4, "num_experts_per_tok": 2}),
    "mixtral": Architecture("mixtral", more={"num_local_experts": 4}),
    "qwen3_moe": Architecture(
        "qwen3_moe",
        more={
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "head_dim": 64,
        },
    ),
    "granitemoe": Architecture(
        "granitemoe", more={"num_local_experts": 4, "attention_multiplier": 0.125}
    ),
    "phimoe": Architecture(
        "phimoe",
        more={"num_local_experts": 4, "sliding_window": None},
        published_as="PhiMoEForCausalLM",
    ),
    "glm4_moe": Architecture(
        "glm4_moe",
        more={
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "head_dim": 64,
        },
    ),
}


def write_model(name: str, directory: Path, seed: int = 0) -> Path:
    """Write the model into ``directory`` and return it; the same seed gives the same weights."""
    config = ARCHITECTURES[name].config()
    torch.manual_seed(seed)
    model = transformers().AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # norms that scale, and biases that are not zero
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        head = model.get_output_embeddings()
        if head.bias is not None:
            # sglang leaves it out
            head.bias.zero_()
        if not config.tie_word_embeddings:
            # a token weighs more in its own prediction than the noise of attention does
            model.get_input_embeddings().weight.normal_()
    model.save_pretrained(directory)
    if published := ARCHITECTURES[name].published_as:
        written = json.loads((directory / "config.json").read_text())
        written["architectures"] = [published]
        (directory / "config.json").write_text(json.dumps(written))
    return directory


def read_model(directory: Path) -> Any:
    """The model as transformers computes it."""
    return transformers().AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )


def transformers() -> Any:
    """The package, which cannot import every torchvision where SGLang has not been imported."""
    declare_missing_operators()
    return importlib.import_module("transformers")
