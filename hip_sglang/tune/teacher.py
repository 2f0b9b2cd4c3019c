"""A model in this process, which reads a document under any attention and is asked what comes next.

What is asked is given token by token, each with the right past (teacher forcing), as decode steps:
keys and values of these tokens are made anew, layer by layer, as a server would make them. Two ways
to attend are compared by how they distribute the next token: the KL divergence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from hip_kernels.layout import PAGE_SIZE, SUB_PAGES, Summaries
from hip_kernels.ops import summarize
from hip_kernels.stored import PagedKV
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from hip_sglang.runtime.torchvision_ops import declare_missing_operators

# tokens of a prompt that are read together, as a server's chunks
CHUNK = 1024


@dataclass
class LayerKV:
    """One layer's keys and values, as a pool whose pages are in order, and summaries of pages."""

    kv: PagedKV
    summaries: dict[int, Summaries]  # by mean keys a page

    @classmethod
    def empty(cls, tokens: int, key: Tensor, value: Tensor) -> LayerKV:
        """Room for so many tokens; key [S, Hkv, D] and value [S, Hkv, Dv] give the shape."""
        pages = -(-tokens // PAGE_SIZE)
        shape = key.shape[1], key.shape[2], value.shape[2]
        made = {means: Summaries.empty(pages, *shape, means=means) for means in (1, SUB_PAGES)}
        keys, values = (x.new_zeros(pages * PAGE_SIZE, *x.shape[1:]) for x in (key, value))
        return cls(PagedKV(keys, values), made)

    @property
    def table(self) -> Tensor:
        """[P]: physical pages in logical order."""
        return torch.arange(len(self.kv.key) // PAGE_SIZE)

    def write(self, first: int, key: Tensor, value: Tensor) -> None:
        """Tokens from ``first`` on, and summaries of the pages that they complete."""
        end = first + len(key)
        self.kv.key[first:end], self.kv.value[first:end] = key, value
        completed = torch.arange(first // PAGE_SIZE, end // PAGE_SIZE)
        for some in torch.split(completed, 256):
            for summaries in self.summaries.values():
                summarize(self.kv, some, summaries)


class Attention(Protocol):
    """One way to attend, in every layer."""

    def prompt(self, layer: int, query: Tensor, stored: LayerKV, first: int) -> Tensor:
        """query [S, Hq, D] of tokens from ``first`` on, which are written -> [S, Hq, Dv]."""
        ...

    def steps(self, layer: int, query: Tensor, stored: LayerKV, first: int) -> Tensor:
        """The same of tokens each of which is a decode step."""
        ...


@dataclass
class Document:
    """What was read, with room for the steps behind it."""

    tokens: int
    room: int
    layers: dict[int, LayerKV]


class Teacher:
    """A causal language model of a Hugging Face directory, in float32."""

    def __init__(self, directory: Path) -> None:
        """Raises ValueError where there is no model, or one whose layers see a window only."""
        declare_missing_operators()
        from transformers import AttentionInterface, AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()  # of the weights: it would stand between ours and errors
        # attention is looked up by name; each teacher has its own
        name = f"hip_sglang_{id(self)}"
        AttentionInterface.register(name, self._attend)
        try:
            self.model = AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, attn_implementation=name, local_files_only=True
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"{directory} has no model to load: {error}") from None
        self.model.eval().requires_grad_(False)
        text = self.model.config.get_text_config()
        if getattr(text, "sliding_window", None):
            raise ValueError(f"{directory}: its layers see a window only; name another model")
        self.layers = int(text.num_hidden_layers)
        self.positions: int | None = getattr(text, "max_position_embeddings", None)

    def has_room_for(self, tokens: int) -> None:
        """Raise ValueError where the model has fewer positions than that."""
        if self.positions is not None and tokens > self.positions:
            raise ValueError(
                f"the model has {self.positions:,} positions, and a document of {tokens:,} tokens "
                "takes more; give shorter ones"
            )

    def read(self, ids: Sequence[int], attention: Attention, room: int) -> Document:
        """Read a prompt, with room for so many tokens behind it."""
        document = Document(0, len(ids) + room, {})
        self.has_room_for(document.room)
        self.read_on(document, 0, ids, attention)
        return document

    def read_on(
        self, document: Document, kept: int, ids: Sequence[int], attention: Attention
    ) -> None:
        """Forget all but the first ``kept`` tokens of a document, and read on from there."""
        document.tokens = kept
        for first in range(0, len(ids), CHUNK):
            self._pass(document, ids[first : first + CHUNK], attention.prompt, 1)

    def ask(self, document: Document, ids: Sequence[int], attention: Attention) -> Tensor:
        """Log-probabilities of the token after each of these, decode steps [S, vocabulary].

        The document is as long afterwards as before, so that it can be asked again.
        """
        before = document.tokens
        found = self._pass(document, ids, attention.steps, len(ids))
        document.tokens = before
        return found

    def _pass(self, document: Document, ids: Sequence[int], attend: Any, last: int) -> Tensor:
        first = document.tokens
        document.tokens += len(ids)
        assert document.tokens <= document.room
        self._now = document, attend, first
        logits = self.model(
            torch.tensor([list(ids)]),
            position_ids=torch.arange(first, document.tokens)[None],
            use_cache=False,
            logits_to_keep=last,
        ).logits[0]
        return log_softmax(logits, -1)

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **others: Any
    ) -> tuple[Tensor, None]:
        """As transformers calls it: [1, heads, S, D] each -> [1, S, Hq, Dv]."""
        document, attend, first = self._now
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        layer = module.layer_idx
        if layer not in document.layers:
            document.layers[layer] = LayerKV.empty(document.room, key, value)
        stored = document.layers[layer]
        stored.write(first, key, value)
        # the kernels scale by the width
        scaled = query * (others["scaling"] * query.shape[2] ** 0.5)
        return attend(layer, scaled.contiguous(), stored, first)[None], None


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats, of log-probabilities [S, vocabulary] -> [S]."""
    return kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).clamp_min(0)
