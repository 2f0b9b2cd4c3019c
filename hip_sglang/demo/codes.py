"""What the built-in model knows of each token: three codes, drawn once from a seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hip_sglang.demo.architecture import CODE_BITS, CONTEXT_WIDTHS, OUTPUT_BITS, VOCABULARY

# a token of this share of the text says half as much about its place as a rare one (squared)
_COMMON = 1e-3


@dataclass(frozen=True)
class TokenCodes:
    """The three codes of every token, and how often it occurs.

    ``word`` tells tokens apart exactly: 12 bits of a random numbering and their parity, as signs,
    so that two tokens differ in at least two places.
    ``context`` describes the surroundings once averaged: random signs, weaker for common tokens,
    centred, so that text without a topic averages to nothing. One for each layer-1 KV head.
    ``output`` names the token that the model says next: random signs.
    """

    frequency: Tensor  # [vocabulary], sums to 1
    word: Tensor  # [vocabulary, CODE_BITS], -1 or 1
    context: tuple[Tensor, ...]  # each [vocabulary, CONTEXT_WIDTHS[head]]
    output: Tensor  # [vocabulary, OUTPUT_BITS], -1 or 1

    @classmethod
    def draw(cls, counts: Tensor, seed: int) -> TokenCodes:
        """counts [vocabulary]: occurrences of each token in typical text."""
        generator = torch.Generator().manual_seed(seed)
        number = torch.randperm(VOCABULARY, generator=generator)
        bits = (number[:, None] >> torch.arange(CODE_BITS - 1)) & 1
        parity = bits.sum(1, keepdim=True) & 1
        word = torch.cat([bits, parity], 1).float() * 2 - 1

        frequency = counts.double() + 0.5
        frequency = (frequency / frequency.sum()).float()
        rarity = (_COMMON / (_COMMON + frequency)).sqrt()
        context = []
        for width in CONTEXT_WIDTHS:
            signs = torch.randn(VOCABULARY, width, generator=generator).sign()
            code = rarity[:, None] * signs / width**0.5
            context.append(code - frequency @ code)
        output = torch.randn(VOCABULARY, OUTPUT_BITS, generator=generator).sign()
        return cls(frequency, word, tuple(context), output)

    def context_power(self, head: int) -> float:
        """The expected squared length of one token's context code in running text."""
        return float(self.frequency @ self.context[head].pow(2).sum(1))
