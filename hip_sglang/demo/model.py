"""Write the built-in model: an ordinary Hugging Face directory of an untrained Llama that works."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from hip_sglang.demo import architecture as arch
from hip_sglang.demo import weights
from hip_sglang.demo.codes import TokenCodes
from hip_sglang.demo.corpus import standard_library
from hip_sglang.demo.vocabulary import (
    END_OF_TEXT_ID,
    Tokenizer,
    save_tokenizer,
    train_tokenizer,
)

# what command lines call it
BUILTIN = "builtin"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def write_model(
    directory: Path, *, dtype: str = "float32", seed: int = 0, text: str | None = None
) -> None:
    """Write config, weights and tokenizer of the quote finder (``weights.py``) into ``directory``.

    7.6M parameters, some seconds. ``text`` is what the tokenizer is trained on, by default the
    standard library; the model tells places apart by seven tokens, so a document in another script
    needs a tokenizer of its own. The same text (or Python release), torch version, dtype and seed
    give the same bytes. Raises ValueError where the dtype is neither "float32" nor "bfloat16".
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(_DTYPES)}")
    directory.mkdir(parents=True, exist_ok=True)
    texts = standard_library() if text is None else [text]
    tokenizer = train_tokenizer(texts)
    # frequencies need no more than a sample
    codes = TokenCodes.draw(_token_counts(tokenizer, texts[::4]), seed)
    state = {name: tensor.to(_DTYPES[dtype]) for name, tensor in state_dict(codes).items()}
    save_tokenizer(tokenizer, directory)
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    _write_json(directory / "config.json", _config(dtype))
    greedy = {"do_sample": False, "eos_token_id": END_OF_TEXT_ID, "pad_token_id": END_OF_TEXT_ID}
    _write_json(directory / "generation_config.json", greedy)


def state_dict(codes: TokenCodes) -> dict[str, Tensor]:
    """All parameters of the model in float32, by the names that transformers gives them."""
    after_layer0 = weights.norm_after_layer0()
    layers = [
        (weights.position_attention(), weights.bag_squares(codes), 1.0, after_layer0),
        (weights.matching_attention(codes), weights.Mlp.zeros(), after_layer0, 1.0),
    ]
    state = {
        "model.embed_tokens.weight": weights.embedding(codes),
        "model.norm.weight": torch.ones(arch.HIDDEN),
        "lm_head.weight": weights.unembedding(codes),
    }
    for index, (attention, mlp, input_norm, mlp_norm) in enumerate(layers):
        prefix = f"model.layers.{index}."
        state |= {
            f"{prefix}self_attn.q_proj.weight": attention.q,
            f"{prefix}self_attn.k_proj.weight": attention.k,
            f"{prefix}self_attn.v_proj.weight": attention.v,
            f"{prefix}self_attn.o_proj.weight": attention.o,
            f"{prefix}mlp.gate_proj.weight": mlp.gate,
            f"{prefix}mlp.up_proj.weight": mlp.up,
            f"{prefix}mlp.down_proj.weight": mlp.down,
            f"{prefix}input_layernorm.weight": torch.full((arch.HIDDEN,), input_norm),
            f"{prefix}post_attention_layernorm.weight": torch.full((arch.HIDDEN,), mlp_norm),
        }
    return state


def _token_counts(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """How often each token occurs in the texts [vocabulary], int64."""
    counts = torch.zeros(arch.VOCABULARY, dtype=torch.int64)
    for encoding in tokenizer.encode_batch_fast(texts):
        counts += torch.bincount(
            torch.tensor(encoding.ids, dtype=torch.int64), minlength=arch.VOCABULARY
        )
    return counts


def _config(dtype: str) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": arch.VOCABULARY,
        "hidden_size": arch.HIDDEN,
        "intermediate_size": arch.INTERMEDIATE,
        "num_hidden_layers": 2,
        "num_attention_heads": arch.QUERY_HEADS,
        "num_key_value_heads": arch.KV_HEADS,
        "head_dim": arch.HEAD_DIM,
        "max_position_embeddings": arch.MAX_POSITION,
        "rms_norm_eps": arch.RMS_EPS,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        # transformers 5 reads the first, older readers the second
        "rope_parameters": {"rope_theta": arch.ROPE_THETA, "rope_type": "default"},
        "rope_theta": arch.ROPE_THETA,
        "bos_token_id": None,
        "eos_token_id": END_OF_TEXT_ID,
        "pad_token_id": END_OF_TEXT_ID,
        "dtype": dtype,
    }


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
