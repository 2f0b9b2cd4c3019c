"""Scratch that the launches of decode steps share, and how what they weigh is laid out.

What kernels weigh stands in *columns*. Without nodes a column is the page of its number. Where a
step searches through nodes its columns are, in page order: the head, which holds the sink; the
pages of the nodes in the beam; the tail, which holds the window. All other nodes are keys of
their own (``weigh.weigh_nodes``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hip_kernels.checks import check
from hip_kernels.layout import NODE_PAGES, SparsePlan
from hip_kernels.steps import DecodeSteps
from hip_kernels.tiles import PAGES_A_TILE


@dataclass(frozen=True)
class Columns:
    """How many columns there are, and of what."""

    flat: int  # pages of a step without nodes, at most
    head: int = 0  # pages before the first node
    beam: int = 0  # pages of the beam
    tail: int = 0  # pages after the last node, at most

    @classmethod
    def of(cls, steps: DecodeSteps, plan: SparsePlan) -> Columns:
        pages = steps.table.shape[1]
        if steps.nodes is None:
            return cls(pages)
        head = -(-plan.sink_pages // NODE_PAGES) * NODE_PAGES
        beam = min(plan.beam, steps.nodes.shape[1]) * NODE_PAGES
        return cls(min(pages, steps.nodes_from), head, beam, plan.window_pages + NODE_PAGES)

    @property
    def far(self) -> int:
        """Columns of a step that searches through nodes."""
        return self.head + self.beam + self.tail

    def __len__(self) -> int:
        return max(self.flat, self.far)


@dataclass(frozen=True)
class Scores:
    """What each column of a step weighs for the heads of one token, -inf where it has none."""

    columns: Columns
    page: Tensor  # [B, Hq, S] float32: the logit of the page as one key
    parts: Tensor  # [L, B, Hq, S] float32: q . mean of each sub-page
    spread: Tensor  # [B, Hq, S] float32: the guarded second cumulant, written where there is one
    mass: Tensor  # [B, Hq, T] float32: the log-sum-exp of each tile of ``PAGES_A_TILE`` columns
    total: Tensor  # [B, Hq] float32: that of all of them
    node: Tensor  # [B, Hq, J] float32: each node as one key; -inf in the beam, and where it is none
    listed: Tensor  # [B, Hkv, S] int64: with nodes, the logical page of each column; -1 is none

    @classmethod
    def of(
        cls, steps: DecodeSteps, heads: int, kv_heads: int, means: int, plan: SparsePlan
    ) -> Scores:
        """Room for the steps' columns."""

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=steps.table.device)

        columns, batch = Columns.of(steps, plan), len(steps)
        shape = batch, heads, len(columns)
        nodes = 0 if steps.nodes is None else steps.nodes.shape[1]
        listed = steps.table.new_empty(batch, kv_heads, columns.far)
        return cls(
            columns=columns,
            page=empty(*shape),
            parts=empty(means, *shape),
            spread=empty(*shape),
            mass=empty(batch, heads, tiles_of(columns, nodes)),
            total=empty(batch, heads),
            node=empty(batch, heads, nodes),
            listed=listed,
        )

    def check(self, batch: int, heads: int) -> None:
        """Assert that the tensors belong together."""
        shape = batch, heads, len(self.columns)
        check("scores.page", self.page, shape, torch.float32)
        check("scores.parts", self.parts, (None, *shape), torch.float32)
        check("scores.spread", self.spread, shape, torch.float32)
        check("scores.total", self.total, (batch, heads), torch.float32)
        check("scores.node", self.node, (batch, heads, None), torch.float32)
        tiles = tiles_of(self.columns, self.node.shape[2])
        check("scores.mass", self.mass, (batch, heads, tiles), torch.float32)
        check("scores.listed", self.listed, (batch, None, self.columns.far), torch.int64)


def tiles_of(columns: Columns, nodes: int) -> int:
    """Tiles that a step has at most, of pages or of nodes, edges and beam."""
    edges = columns.head + columns.tail
    far = sum(-(-size // PAGES_A_TILE) for size in (nodes, edges, columns.beam))
    return max(-(-columns.flat // PAGES_A_TILE), far)
