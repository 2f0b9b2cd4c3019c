"""The weights of the quote finder: a two-layer Llama that continues a quote, untrained.

Given ``document + "\\n" + quote`` it continues the quote as the document does. Layer 0 tells every
token which seven tokens stand before it and what it is surrounded by; layer 1 looks for the place
in the document where the same seven tokens stand before, in the same surroundings, and says what
follows.

Words: rotary pair i (dims i and i + 64 of a head) turns by f_i = 10^(-0.1875 i) radians a token
(theta = 10^12). RMSNorm never disturbs: every embedding row has |x|^2 = HIDDEN exactly (the
compensator dim pads it), and what layer 0 adds has constant length but for 0.1%, so that each norm
is the identity with a constant weight.

**Layer 0, attention: positions only.** Keys and queries are made of the constant dim alone. A
constant key on pair i and a constant query turned by the angle f_i j give the logit
w_i cos(f_i (t - s - j)).

* *Offset heads*, j = 1..7: pairs 0..12 with weights 20, 10, 8, 6, 6 ...: the logit is 98 at
  s = t - j and at least 12.3 lower at every other distance up to 1M. So the head copies the word
  code of token t - j.
* *The context head*, j = 0: pairs 9..31 with weight 4: a smooth kernel that forgets: half of its
  mass lies within 14 tokens, 99% within 50. It averages the context codes: the bag of the
  surroundings, b(t).

All heads of a KV group share the key; only their queries differ.

**Layer 0, MLP: the bag's length.** For a = x_d, silu(a) a + silu(-a) (-a) = a^2 exactly, so
2 x 38 neurons compute |b|^2 of both bags.

**Layer 1, attention: matching.** The content lies on the slow pairs 32..63 (one radian in 1M
tokens at most), so the logit hardly depends on the distance. With the word codes c, their n signs
and B = ``MATCH_LOGIT``:

    logit(t, s) = B / n * sum_j c(t - j) . c(s - 1 - j)   the n-gram up to t, the one before s
                + g^2 (b(t) . b(s) - |b(s)|^2 / 2)        minus half the bags' squared distance

A full match scores B. The bags decide between places with similar n-grams, and let a whole page
stand out from afar, which is what summaries of pages can see. The last term keeps a place with a
long bag from winning by its length. Head 0 compares trigrams, 13 signs a token; head 1, which has
the larger vote, compares 7-grams with 7 signs a token. The value is the output code of s.

**Output.** The unembedding is the output code, scaled so that a token's logit is about 32 times the
attention mass on the places that are followed by it; two random codes overlap by 0.3 at most, so a
clear case wins by 22.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hip_sglang.demo.architecture import (
    CODE_BITS,
    CONTEXT,
    CONTEXT_WIDTHS,
    GROUP,
    HEAD_DIM,
    HIDDEN,
    INTERMEDIATE,
    KV_HEADS,
    LAYER0_HEADS,
    NGRAMS,
    OFFSETS,
    OUTPUT_BITS,
    QUERY_HEADS,
    RESIDUAL,
    SLOW_DIMS,
    VOCABULARY,
    rope_frequencies,
)
from hip_sglang.demo.codes import TokenCodes

# the constant dim is large: it feeds layer 0 and steadies the norms
CONSTANT = 16.0

# layer 0: the weights of the pairs, from pair 0 on
OFFSET_WEIGHTS = torch.tensor([20.0, 10.0, 8.0] + [6.0] * 10)
CONTEXT_WEIGHTS = torch.tensor([0.0] * 9 + [4.0] * 23)
POSITION_KEY = 4.0

# layer 1, a KV head each: logit of a full n-gram match; what the right surroundings add to it, as a
# share of it; the head's share in the vote
MATCH_LOGIT = (96.0, 128.0)
CONTEXT_SHARE = (1.0, 0.25)
VOTE = (0.4, 0.6)

# the squared bag as it stands in the residual stream, relative to its mean: small beside HIDDEN
SQUARE_SCALE = 0.1

LOGIT_SCALE = 38.4


@dataclass(frozen=True)
class Attention:
    """The projections of one layer, as transformers stores them: [outputs, inputs]."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor

    @classmethod
    def zeros(cls) -> Attention:
        return cls(
            q=torch.zeros(QUERY_HEADS * HEAD_DIM, HIDDEN),
            k=torch.zeros(KV_HEADS * HEAD_DIM, HIDDEN),
            v=torch.zeros(KV_HEADS * HEAD_DIM, HIDDEN),
            o=torch.zeros(HIDDEN, QUERY_HEADS * HEAD_DIM),
        )


@dataclass(frozen=True)
class Mlp:
    """The projections of one gated MLP: [outputs, inputs]."""

    gate: Tensor
    up: Tensor
    down: Tensor

    @classmethod
    def zeros(cls) -> Mlp:
        return cls(
            gate=torch.zeros(INTERMEDIATE, HIDDEN),
            up=torch.zeros(INTERMEDIATE, HIDDEN),
            down=torch.zeros(HIDDEN, INTERMEDIATE),
        )


def embedding(codes: TokenCodes) -> Tensor:
    """[vocabulary, HIDDEN], every row of squared length HIDDEN."""
    rows = torch.zeros(VOCABULARY, HIDDEN)
    rows[:, RESIDUAL["constant"]] = CONSTANT
    rows[:, RESIDUAL["code"]] = codes.word
    rows[:, RESIDUAL["value"]] = 0.5 * codes.output
    for head, context in enumerate(codes.context):
        rows[:, RESIDUAL[f"context{head}"]] = context
    rows[:, RESIDUAL["compensator"]] = (HIDDEN - rows.pow(2).sum(1, keepdim=True)).sqrt()
    return rows


def unembedding(codes: TokenCodes) -> Tensor:
    """[vocabulary, HIDDEN]."""
    rows = torch.zeros(VOCABULARY, HIDDEN)
    rows[:, RESIDUAL["output"]] = codes.output * (LOGIT_SCALE / OUTPUT_BITS)
    return rows


def position_attention() -> Attention:
    """Layer 0: copy the word codes of the last seven tokens, and average the context codes."""
    weights, frequencies = Attention.zeros(), rope_frequencies()
    both_contexts = sum(CONTEXT_WIDTHS)
    for group, heads in enumerate(LAYER0_HEADS):
        key = group * HEAD_DIM
        word = slice(key, key + CODE_BITS)
        surroundings = slice(word.stop, word.stop + both_contexts)
        weights.k[key : key + 32, RESIDUAL["constant"]] = POSITION_KEY / CONSTANT
        weights.v[word, RESIDUAL["code"]] = torch.eye(CODE_BITS)
        if CONTEXT in heads:
            contexts = slice(RESIDUAL["context0"].start, RESIDUAL["context1"].stop)
            weights.v[surroundings, contexts] = torch.eye(both_contexts)

        for index, head in enumerate(heads):
            first = (group * GROUP + index) * HEAD_DIM
            if head == CONTEXT:
                pair_weights, offset = CONTEXT_WEIGHTS, 0
                bags = slice(RESIDUAL["bag0"].start, RESIDUAL["bag1"].stop)
                columns = slice(first + CODE_BITS, first + CODE_BITS + both_contexts)
                weights.o[bags, columns] = torch.eye(both_contexts)
            else:
                pair_weights, offset = OFFSET_WEIGHTS, int(head)
                columns = slice(first, first + CODE_BITS)
                weights.o[RESIDUAL[f"previous{offset}"], columns] = torch.eye(CODE_BITS)
            pairs = len(pair_weights)
            amplitude = pair_weights * math.sqrt(HEAD_DIM) / POSITION_KEY / CONSTANT
            angle = frequencies[:pairs] * offset
            rotated = first + HEAD_DIM // 2
            weights.q[first : first + pairs, RESIDUAL["constant"].start] = amplitude * angle.cos()
            weights.q[rotated : rotated + pairs, RESIDUAL["constant"].start] = (
                -amplitude * angle.sin()
            )
    return weights


def bag_squares(codes: TokenCodes) -> Mlp:
    """Layer 0: the squared length of each bag, as a share ``SQUARE_SCALE`` of its mean."""
    weights, neuron = Mlp.zeros(), 0
    for head in range(KV_HEADS):
        bag = RESIDUAL[f"bag{head}"]
        for dim in range(bag.start, bag.stop):
            for sign in (1.0, -1.0):
                weights.gate[neuron, dim] = weights.up[neuron, dim] = sign
                weights.down[RESIDUAL[f"square{head}"], neuron] = SQUARE_SCALE / bag_power(
                    codes, head
                )
                neuron += 1
    return weights


def matching_attention(codes: TokenCodes) -> Attention:
    """Layer 1: find the place with the same n-gram and surroundings, and return what follows."""
    weights = Attention.zeros()
    for head in range(KV_HEADS):
        key_rows = list(SLOW_DIMS)
        power = bag_power(codes, head)
        signs = sum(len(bits) for _, bits in NGRAMS[head])
        sign = math.sqrt(MATCH_LOGIT[head] / signs)
        context = math.sqrt(CONTEXT_SHARE[head] * MATCH_LOGIT[head] / power)

        # (key's source, key's weight, query's source, query's weight) of each content dim
        dims: list[tuple[int, float, int, float]] = []
        for offset, bits in NGRAMS[head]:
            query_source = RESIDUAL[f"previous{offset}" if offset else "code"].start
            key_source = RESIDUAL[f"previous{offset + 1}"].start
            dims += [(key_source + bit, sign, query_source + bit, sign) for bit in bits]
        length = -0.5 * context * math.sqrt(power) / SQUARE_SCALE
        dims.append(
            (
                RESIDUAL[f"square{head}"].start,
                length,
                RESIDUAL["constant"].start,
                context * math.sqrt(power) / CONSTANT,
            )
        )
        bag = RESIDUAL[f"bag{head}"]
        dims += [(dim, context, dim, context) for dim in range(bag.start, bag.stop)]

        queries = range(head * GROUP, (head + 1) * GROUP)
        for row, (key_source, key_weight, query_source, query_weight) in zip(
            key_rows, dims, strict=True
        ):
            weights.k[head * HEAD_DIM + row, key_source] = key_weight
            for query in queries:
                scale = query_weight * math.sqrt(HEAD_DIM)
                weights.q[query * HEAD_DIM + row, query_source] = scale
        value = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        weights.v[value, RESIDUAL["value"]] = 2 * torch.eye(OUTPUT_BITS)
        for query in queries:
            columns = slice(query * HEAD_DIM, (query + 1) * HEAD_DIM)
            weights.o[RESIDUAL["output"], columns] = torch.eye(OUTPUT_BITS) * VOTE[head] / GROUP
    return weights


def bag_power(codes: TokenCodes, head: int) -> float:
    """The expected squared length of a bag in running text, were its tokens independent."""
    distances = torch.arange(4096).double()[:, None]
    frequencies = rope_frequencies()[: len(CONTEXT_WEIGHTS)].double()
    kernel = (torch.cos(distances * frequencies) @ CONTEXT_WEIGHTS.double()).softmax(0)
    return codes.context_power(head) * float(kernel.pow(2).sum())


def norm_after_layer0() -> float:
    """The norm weight that makes RMSNorm the identity once layer 0 has added its word codes."""
    # 0.25: the mean squared length of what the bags and their squares add, measured on source code
    return math.sqrt((HIDDEN + OFFSETS * CODE_BITS + 0.25) / HIDDEN)
