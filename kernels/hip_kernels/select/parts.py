"""What blocks of a prompt weigh, on a GPU: part after part, each a pass of its own.

Without nodes there is one part, every page. A search through nodes leaves two: the nodes that are
not in its beam, and the pages of the others.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, int64

from hip_kernels.checks import check, check_summaries
from hip_kernels.layout import PAGE_SIZE, QueryBlocks, Summaries


@dataclass(frozen=True)
class Part:
    """Pages, or nodes, that each block and KV head weighs."""

    summaries: Summaries
    table: Tensor  # [N | 1, P] where each block's are
    listed: Tensor | None = None  # [N, Hkv, C] int64: which; -1 is none. None: all before the block
    pages: int = 1  # of which each is

    @property
    def columns(self) -> int:
        return (self.table if self.listed is None else self.listed).shape[-1]

    @property
    def tokens(self) -> int:
        return self.pages * PAGE_SIZE

    @property
    def stride(self) -> int:
        """How far apart the tables of two blocks are; 0 where they share one."""
        return self.table.shape[1] if len(self.table) > 1 else 0

    def check(self, blocks: int, kv_heads: int) -> None:
        """Assert that the tensors belong together."""
        check_summaries("summaries", self.summaries, kv_heads)
        check("table", self.table, (blocks if len(self.table) > 1 else 1, None), int64)
        if self.listed is not None:
            check("listed", self.listed, (blocks, kv_heads, None), int64)


def every_page(summaries: Summaries, blocks: QueryBlocks) -> Part:
    """All that is before the blocks."""
    return Part(summaries, blocks.table)
