"""What is trained, on how much: one recipe for a GPU, one for a laptop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

HEAD_DIM = 128  # the kernels' own


@dataclass(frozen=True)
class Stage:
    """Steps on contexts of one length."""

    tokens: int  # of a sequence
    sequences: int  # a step
    steps: int  # at most; fewer where the lessons are learned before


@dataclass(frozen=True)
class Recipe:
    """A Llama, and its curriculum: contexts grow when what is short is learned."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    inner: int  # width of the MLP
    vocabulary: int  # at most
    theta: float  # of RoPE
    rate: float  # of learning
    stages: tuple[Stage, ...]

    @property
    def config(self) -> dict[str, Any]:
        """The keyword arguments of ``LlamaConfig``."""
        return {
            "num_hidden_layers": self.layers,
            "hidden_size": self.width,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": HEAD_DIM,
            "intermediate_size": self.inner,
            "max_position_embeddings": self.stages[-1].tokens,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.theta},
            "tie_word_embeddings": True,
        }


RECIPES = {
    # some 1M parameters, to 4K
    "cpu": Recipe(
        layers=3, width=128, heads=4, kv_heads=2, inner=384, vocabulary=1024,
        theta=1e6, rate=3e-3,
        stages=(
            Stage(64, 64, 1500), Stage(256, 16, 500), Stage(1024, 6, 250), Stage(4096, 2, 700),
        ),
    ),
    # some 14M parameters, to 32K
    "gpu": Recipe(
        layers=4, width=512, heads=8, kv_heads=2, inner=1408, vocabulary=4096,
        theta=1e7, rate=2e-3,
        stages=(
            Stage(128, 1024, 1500), Stage(512, 256, 1000), Stage(2048, 64, 700),
            Stage(8192, 16, 500), Stage(32768, 4, 300),
        ),
    ),
}  # fmt: skip
