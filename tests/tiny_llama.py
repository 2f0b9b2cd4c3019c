"""A tiny random Llama: an ordinary model directory with a real tokenizer, made in a second."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCABULARY = 4, 256, 4, 2, 64, 512, 1024
END_OF_TEXT = "<|endoftext|>"


def write_tiny_llama(
    directory: Path,
    *,
    context: int = 32768,
    seed: int = 0,
    vocabulary: int = VOCABULARY,
    peak: float = 1.0,
    topics: int | None = None,
) -> Path:
    """Write the model into ``directory`` and return it; the same seed gives the same weights.

    A larger ``vocabulary`` is padding: such tokens can be read, and are never the greedy answer.
    ``peak`` is the standard deviation of attention logits between tokens that do not know of one
    another. Tokens of one of ``topics`` stand in a row in the vocabulary and share most of their
    embedding.
    """
    directory.mkdir(parents=True, exist_ok=True)
    state = _weights(seed)
    if topics is not None:
        _relate(state, topics, seed)
    _pad(state, vocabulary, seed)
    _sharpen(state, peak)
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": context,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config))
    _train_tokenizer().save(str(directory / "tokenizer.json"))
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return directory


def _weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    state = {
        # rows of unit size, so that greedy tokens differ by more than rounding
        "model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN, generator=generator),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": random(VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        state |= {
            f"{prefix}.self_attn.q_proj.weight": random(HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": random(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": random(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": random(HIDDEN, HEADS * HEAD_DIM),
            f"{prefix}.mlp.gate_proj.weight": random(MLP, HIDDEN),
            f"{prefix}.mlp.up_proj.weight": random(MLP, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": random(HIDDEN, MLP),
            f"{prefix}.input_layernorm.weight": torch.ones(HIDDEN),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(HIDDEN),
        }
    return state


def _relate(state: dict[str, torch.Tensor], topics: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed + 2)
    shared = torch.randn(topics, HIDDEN, generator=generator)
    shared = shared.repeat_interleave(VOCABULARY // topics, dim=0)
    own = state["model.embed_tokens.weight"]
    state["model.embed_tokens.weight"] = 0.7**0.5 * shared + 0.3**0.5 * own


def _pad(state: dict[str, torch.Tensor], vocabulary: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed + 1)
    more = torch.randn(vocabulary - VOCABULARY, HIDDEN, generator=generator)
    given = state["model.embed_tokens.weight"]
    state["model.embed_tokens.weight"] = torch.cat([given, more])
    # their logits are 0, and the largest of a thousand random ones is more
    state["lm_head.weight"] = torch.cat([state["lm_head.weight"], torch.zeros_like(more)])


def _sharpen(state: dict[str, torch.Tensor], peak: float) -> None:
    for name in state:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            state[name] *= peak**0.5


def _train_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    return tokenizer
