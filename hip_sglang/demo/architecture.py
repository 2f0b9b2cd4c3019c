"""The shape of the built-in model and what each dimension of its residual stream holds.

The mathematics that fills this shape is in ``weights.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

HIDDEN = 512
HEAD_DIM = 128
QUERY_HEADS = 8
KV_HEADS = 2
GROUP = QUERY_HEADS // KV_HEADS
INTERMEDIATE = 256
VOCABULARY = 4096
ROPE_THETA = 1e12
MAX_POSITION = 1 << 20
RMS_EPS = 1e-6

# a token is a word of 13 signs; a match head sees the signs of the last tokens
CODE_BITS = 13
OUTPUT_BITS = 128
OFFSETS = 7

# what the four query heads of each layer-0 KV group attend to: so many tokens back, or the context
CONTEXT = "context"
LAYER0_HEADS: tuple[tuple[int | str, ...], ...] = ((1, 2, 3, CONTEXT), (4, 5, 6, 7))

# which signs of the token `offset` back each layer-1 KV head compares. head 0: three whole tokens;
# head 1: seven tokens of seven signs each, alternately the first and the last seven of the thirteen
NGRAMS: tuple[tuple[tuple[int, range], ...], ...] = (
    tuple((offset, range(CODE_BITS)) for offset in range(3)),
    tuple((offset, range(7) if offset % 2 == 0 else range(6, 13)) for offset in range(OFFSETS)),
)

# rotary pair i is dims (i, i + 64). the slow half carries content, slowest first: its fastest pair
# turns one radian in 1M tokens. the fast half carries positions
SLOW_DIMS = tuple(dim for pair in range(63, 31, -1) for dim in (pair, pair + 64))

# content dims that the n-gram leaves over: one for the context's length, the others for the context
CONTEXT_WIDTHS = tuple(len(SLOW_DIMS) - sum(len(bits) for _, bits in ngram) - 1 for ngram in NGRAMS)


def rope_frequencies() -> Tensor:
    """Radians a token of each rotary pair [HEAD_DIM / 2], as transformers computes them."""
    return 1.0 / ROPE_THETA ** (torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)


def _residual_layout() -> dict[str, slice]:
    widths = {
        "constant": 1,
        "compensator": 1,
        "code": CODE_BITS,
        "context0": CONTEXT_WIDTHS[0],
        "context1": CONTEXT_WIDTHS[1],
        "value": OUTPUT_BITS,
        **{f"previous{offset}": CODE_BITS for offset in range(1, OFFSETS + 1)},
        "bag0": CONTEXT_WIDTHS[0],
        "bag1": CONTEXT_WIDTHS[1],
        "square0": 1,
        "square1": 1,
        "output": OUTPUT_BITS,
    }
    layout, start = {}, 0
    for name, width in widths.items():
        layout[name] = slice(start, start + width)
        start += width
    assert start <= HIDDEN, f"the residual stream needs {start} of {HIDDEN} dimensions"
    return layout


# where each quantity lives in the residual stream. written by the embedding: constant .. value;
# by layer 0's attention: previous*, bag*; by layer 0's MLP: square*; by layer 1: output
RESIDUAL = _residual_layout()
