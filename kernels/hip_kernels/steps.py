"""Decode steps as kernels go through them: what differs from one to the next stands in tensors.

So the same launches serve any batch of a size, and a CUDA graph of them any batch that follows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hip_kernels.layout import QueryBlocks

# a page that no context reaches
NO_PAGE = 1 << 30


@dataclass(frozen=True)
class DecodeSteps:
    """Query blocks of one row, each of a request of its own."""

    token: Tensor  # [B] int64: index of each in the flat batch
    position: Tensor  # [B] int64: its place in its request
    page: Tensor  # [B] int64: the logical page that holds it; those before it are complete
    table: Tensor  # [B, P] int64: physical pages in logical order; past its own anything
    row: Tensor  # [B] int64: where each keeps its choice
    reuses: Tensor  # [B] int32: whether it attends to what stands there
    nodes: Tensor | None = None  # [B, J] int64: where its nodes are, in order
    sparse_from: int = 0  # steps in this page or a later one prune
    nodes_from: int = 0  # of these, those in this page or a later one search through nodes

    def __len__(self) -> int:
        return len(self.token)

    @property
    def far_from(self) -> int:
        """The page from which on steps search through nodes."""
        return NO_PAGE if self.nodes is None else self.nodes_from

    @classmethod
    def of(cls, blocks: QueryBlocks, *, reuses: bool) -> DecodeSteps:
        """Blocks of one row; ``reuses`` tells whether their choices are known."""
        count, device = len(blocks), blocks.table.device
        return cls(
            token=blocks.tokens.squeeze(1),
            position=blocks.position.squeeze(1),
            page=blocks.page,
            table=blocks.table.expand(count, -1).contiguous(),
            row=torch.arange(count, device=device),
            reuses=torch.full((count,), int(reuses), dtype=torch.int32, device=device),
            nodes=None if blocks.nodes is None else blocks.nodes.physical.contiguous(),
            sparse_from=NO_PAGE if blocks.local is None else 0,
        )
