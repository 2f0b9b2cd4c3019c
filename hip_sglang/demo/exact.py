"""The built-in model, exactly and at any length, without a server: for tests and benchmarks.

Layer 0 looks at distances only, so that its attention is a causal convolution (by FFT: exact, in
linear memory). Layer 1's keys, values and queries are handed out, so that any attention can be
judged by the tokens that it leads to:

    model = ExactModel(directory)
    document = ExactDocument.of(model, document_ids)
    steps = document.teacher_forced(quote.suffix_ids, quote.expected_ids)
    right = model.logits(steps.residual, attend(steps)).argmax(-1) == steps.expected
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from hip_sglang.demo.architecture import (
    GROUP,
    HEAD_DIM,
    KV_HEADS,
    QUERY_HEADS,
    RMS_EPS,
    rope_frequencies,
)

# beyond this distance layer 0 has less than 1e-5 of its attention
_LAYER0_REACH = 8192
# before this position some heads see none of the tokens that they look for: all their weights are
# tiny, and the rounding of the FFT is not
_LAYER0_START = 64


class ExactModel:
    """The weights of a ``write_model`` directory; every result is rounded to ``dtype``."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        self._dtype = dtype
        state = load_file(directory / "model.safetensors")
        self._weights = {
            name.removeprefix("model."): self._round(weight.float())
            for name, weight in state.items()
        }
        embedding = self._norm(self._weights["embed_tokens.weight"], "layers.0.input_layernorm")
        # layer 0's queries and keys come from the constant dim: they are the same for every token
        self._query = self._linear(embedding[0], "layers.0.self_attn.q_proj").view(QUERY_HEADS, -1)
        self._key = self._linear(embedding[0], "layers.0.self_attn.k_proj").view(KV_HEADS, -1)
        value = self._linear(embedding, "layers.0.self_attn.v_proj")
        # [vocabulary, KV_HEADS, HEAD_DIM]
        self._value = value.view(-1, KV_HEADS, HEAD_DIM)

    def residual(self, ids: Tensor, last: int | None = None) -> Tensor:
        """The residual stream after layer 0 of the ``last`` tokens, or all -> [last, HIDDEN]."""
        if last is None:
            attention = self._convolve(ids)
        else:
            attention = self._attend_last(ids[-(_LAYER0_REACH + last) :], last)
            ids = ids[-last:]
        x = self._weights["embed_tokens.weight"][ids]
        x = self._round(x + self._linear(self._round(attention), "layers.0.self_attn.o_proj"))
        return self._round(x + self._mlp(self._norm(x, "layers.0.post_attention_layernorm")))

    def keys_values(self, residual: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Layer 1's K and V [KV_HEADS, T, HEAD_DIM] of the tokens at positions ``first``, ..."""
        x = self._norm(residual, "layers.1.input_layernorm")
        key, value = (
            self._linear(x, f"layers.1.self_attn.{name}_proj").view(-1, KV_HEADS, HEAD_DIM)
            for name in "kv"
        )
        return self._rotate(key, first).transpose(0, 1), value.transpose(0, 1)

    def queries(self, residual: Tensor, first: int) -> Tensor:
        """Layer 1's Q [T, QUERY_HEADS, HEAD_DIM], not yet scaled by 1 / sqrt(HEAD_DIM)."""
        x = self._norm(residual, "layers.1.input_layernorm")
        query = self._linear(x, "layers.1.self_attn.q_proj").view(-1, QUERY_HEADS, HEAD_DIM)
        return self._rotate(query, first)

    def logits(self, residual: Tensor, attention: Tensor) -> Tensor:
        """The logits [S, vocabulary].

        residual [S, HIDDEN]; attention [S, QUERY_HEADS, HEAD_DIM]: layer 1's attention output.
        """
        output = self._linear(self._round(attention.flatten(1)), "layers.1.self_attn.o_proj")
        # layer 1's MLP is zero
        x = self._norm(self._round(residual + output), "norm")
        return x @ self._weights["lm_head.weight"].T

    def _convolve(self, ids: Tensor) -> Tensor:
        """Layer 0's attention output of every token [T, QUERY_HEADS * HEAD_DIM], float32."""
        start = ids[:_LAYER0_START]
        tokens = len(ids)
        kernel = self._kernels(tokens)
        mass = kernel.cumsum(1)
        padded = 1 << (2 * tokens - 1).bit_length()
        spectrum = torch.fft.rfft(kernel, padded)
        output = torch.zeros(tokens, QUERY_HEADS, HEAD_DIM)
        for group in range(KV_HEADS):
            value = self._value[:, group]
            for dim in value.any(0).nonzero().flatten().tolist():
                signal = torch.fft.rfft(value[ids, dim].double(), padded)
                for head in range(group * GROUP, (group + 1) * GROUP):
                    summed = torch.fft.irfft(signal * spectrum[head], padded)[:tokens]
                    output[:, head, dim] = (summed / mass[head]).float()
        output = output.flatten(1)
        output[: len(start)] = self._attend_last(start, len(start))
        return output

    def _attend_last(self, ids: Tensor, last: int) -> Tensor:
        """The same of the last tokens only, by matrix products [last, QUERY_HEADS * HEAD_DIM]."""
        tokens = len(ids)
        distance = torch.arange(tokens - last, tokens)[:, None] - torch.arange(tokens)
        kernel = self._kernels(tokens)[:, distance.clamp_min(0)].masked_fill(distance < 0, 0.0)
        weights = kernel / kernel.sum(-1, keepdim=True)
        value = self._value[ids].transpose(0, 1).double().repeat_interleave(GROUP, 0)
        return (weights @ value).transpose(0, 1).flatten(1).float()

    def _kernels(self, tokens: int) -> Tensor:
        """exp(logit) of layer 0 at distances 0, 1, ... -> [QUERY_HEADS, tokens], its largest 1."""
        half = HEAD_DIM // 2
        angle = torch.arange(tokens).double()[:, None] * rope_frequencies().double()
        query, key = self._query.double(), self._key.double().repeat_interleave(GROUP, 0)
        even = query[:, :half] * key[:, :half] + query[:, half:] * key[:, half:]
        odd = query[:, :half] * key[:, half:] - query[:, half:] * key[:, :half]
        logit = (angle.cos() @ even.T + angle.sin() @ odd.T).T / math.sqrt(HEAD_DIM)
        weights: Tensor = (logit - logit.amax(1, keepdim=True)).exp()
        return weights

    def _mlp(self, x: Tensor) -> Tensor:
        gate = self._round(functional.silu(self._linear(x, "layers.0.mlp.gate_proj")))
        hidden = self._round(gate * self._linear(x, "layers.0.mlp.up_proj"))
        return self._linear(hidden, "layers.0.mlp.down_proj")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return self._round(x @ self._weights[f"{name}.weight"].T)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scaled = self._round(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + RMS_EPS))
        return self._round(self._weights[f"{name}.weight"] * scaled)

    def _rotate(self, x: Tensor, first: int) -> Tensor:
        """RoPE of x [T, heads, HEAD_DIM] whose first row stands at position ``first``."""
        angle = torch.arange(first, first + len(x)).float()[:, None] * rope_frequencies()
        cos, sin = self._round(angle.cos())[:, None], self._round(angle.sin())[:, None]
        even, odd = x.chunk(2, -1)
        return self._round(torch.cat([even * cos - odd * sin, odd * cos + even * sin], -1))

    def _round(self, x: Tensor) -> Tensor:
        return x.to(self._dtype).float()


@dataclass(frozen=True)
class Steps:
    """Layer 1 of consecutive decode steps. Step i sees the first ``visible[i]`` tokens."""

    keys: Tensor  # [KV_HEADS, T, HEAD_DIM]
    values: Tensor  # [KV_HEADS, T, HEAD_DIM]
    queries: Tensor  # [S, QUERY_HEADS, HEAD_DIM]
    visible: Tensor  # [S], int64
    residual: Tensor  # [S, HIDDEN], for ExactModel.logits
    expected: Tensor  # [S], int64: the right next tokens


@dataclass(frozen=True)
class ExactDocument:
    """Layer 1's keys and values of a document, shared by all quotes from it."""

    model: ExactModel
    ids: Tensor  # [T], int64
    keys: Tensor  # [KV_HEADS, T, HEAD_DIM]
    values: Tensor  # [KV_HEADS, T, HEAD_DIM]

    @classmethod
    @torch.no_grad()
    def of(cls, model: ExactModel, ids: list[int]) -> ExactDocument:
        tokens = torch.tensor(ids)
        return cls(model, tokens, *model.keys_values(model.residual(tokens), 0))

    @torch.no_grad()
    def teacher_forced(self, suffix: tuple[int, ...], expected: tuple[int, ...]) -> Steps:
        """The steps that predict ``expected`` after the document and ``suffix``, the past given.

        Up to the first error this is greedy decoding; all right here means all right there.
        """
        tail = torch.tensor([*suffix, *expected[:-1]])
        document = len(self.ids)
        residual = self.model.residual(torch.cat([self.ids, tail]), len(tail))
        keys, values = self.model.keys_values(residual, document)
        first = len(suffix) - 1
        return Steps(
            keys=torch.cat([self.keys, keys], 1),
            values=torch.cat([self.values, values], 1),
            queries=self.model.queries(residual, document)[first:],
            visible=torch.arange(document + first, document + len(tail)) + 1,
            residual=residual[first:],
            expected=torch.tensor(expected),
        )


def attend_densely(steps: Steps) -> tuple[Tensor, Tensor]:
    """Full attention: its output [S, QUERY_HEADS, HEAD_DIM] and weights [S, QUERY_HEADS, T]."""
    grouped = steps.queries.view(-1, KV_HEADS, GROUP, HEAD_DIM) / math.sqrt(HEAD_DIM)
    logits = torch.einsum("sghd,gtd->sght", grouped, steps.keys)
    future = torch.arange(steps.keys.shape[1]) >= steps.visible[:, None]
    weights = logits.masked_fill(future[:, None, None], -torch.inf).softmax(-1)
    output = torch.einsum("sght,gtd->sghd", weights, steps.values)
    return output.flatten(1, 2), weights.flatten(1, 2)
