"""What one forward pass computes: made once, shared by all layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from hip_kernels.layout import NODE_PAGES, PAGE_SIZE, QueryBlocks
from hip_kernels.ops import plan_blocks
from torch import Tensor

from hip_sglang.attention.selection_cache import reused
from hip_sglang.kv.node_directory import NodeDirectory

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from hip_sglang.attention.selection_cache import SelectionCache
    from hip_sglang.config import HipConfig, LayerPlan


@dataclass(frozen=True)
class NodePlan:
    """The nodes of the requests that are long enough for them."""

    start: int  # blocks at this position or later use nodes
    table: Tensor  # [B, J] where each request's nodes are; past its last one anything
    new_pages: Tensor  # [C, NODE_PAGES] physical pages of the nodes that are to be made now
    new_places: Tensor  # [C] and where they go

    @classmethod
    def of(
        cls,
        directory: NodeDirectory,
        start: int,
        seq_lens: list[int],
        page_table: Tensor,
    ) -> NodePlan | None:
        """None where no request is long enough."""
        pages = (torch.tensor(seq_lens, device=page_table.device) - 1) // PAGE_SIZE
        count = (pages // NODE_PAGES).where(pages * PAGE_SIZE >= start, 0)  # [B]
        most = int(count.max()) if len(seq_lens) else 0
        if most == 0:
            return None
        children = page_table[:, : most * NODE_PAGES].reshape(-1, most, NODE_PAGES)
        real = torch.arange(most, device=count.device) < count[:, None]  # [B, J]
        pages_of = children[real]  # [K, NODE_PAGES]
        places, new = directory.find(pages_of[:, -1])
        table = torch.zeros_like(real, dtype=torch.int64)
        table[real] = places
        return cls(start, table, pages_of[new], places[new])


@dataclass
class ForwardPlan:
    """The batch as the kernels see it: pages and query blocks."""

    prefix_lens: list[int]  # [B] tokens of each request that are in the pool already
    seq_lens: list[int]  # [B] with the tokens of this pass
    decodes: Tensor  # [B] requests that are decode steps
    page_table: Tensor  # [B, P] physical pages; past a request's end anything
    completed: Tensor  # [C] physical pages whose 64th token this pass writes
    request_ids: list[str]
    rows: Tensor  # [B] SGLang's row of each request
    nodes: NodePlan | None = None
    # by a layer's ``refresh``: [B] requests that attend to what they chose before
    reuses: Mapping[int, Tensor] = field(default_factory=dict)
    _blocks: dict[tuple[int | None, ...], list[QueryBlocks]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        batch: ForwardBatch,
        req_to_token: Tensor,
        config: HipConfig,
        directory: NodeDirectory | None,
        cache: SelectionCache | None,
    ) -> ForwardPlan:
        """req_to_token: SGLang's table [rows, context], slot of each request's every token."""
        assert batch.seq_lens_cpu is not None
        seq_lens = batch.seq_lens_cpu.tolist()
        names = batch.rids or []
        if batch.forward_mode.is_decode():
            prefix_lens = [length - 1 for length in seq_lens]
            prompts = 0
        else:
            prefix_lens = list(batch.extend_prefix_lens_cpu)
            # SGLang's warm-up batches are prompts without a name
            prompts = len(seq_lens) - getattr(names, "decode_steps", 0)
        decodes = torch.arange(len(seq_lens)) >= prompts
        longest = max(seq_lens, default=0)
        rows = batch.req_pool_indices.long()
        page_table = page_tables(req_to_token, rows, longest)
        completed = completed_pages(prefix_lens, seq_lens, page_table)
        nodes, reuses = None, {}
        if directory is not None and config.nodes_from is not None:
            directory.forget(completed)
            nodes = NodePlan.of(directory, config.nodes_from, seq_lens, page_table)
        if cache is not None:
            steps = torch.arange(len(seq_lens), device=rows.device) >= prompts
            held = cache.step(rows, steps, batch.seq_lens.long(), config.start)
            # it waits for the device; prompts alone use nothing again
            if prompts < len(seq_lens):
                lengths, held = torch.tensor(seq_lens), held.cpu()
                reuses = {n: reused(held, lengths, n) for n in config.refreshes}
        return cls(
            prefix_lens=prefix_lens,
            seq_lens=seq_lens,
            decodes=decodes,
            page_table=page_table,
            completed=completed,
            request_ids=list(names),
            rows=rows,
            nodes=nodes,
            reuses=reuses,
        )

    def prunes(self, layer: LayerPlan) -> bool:
        """Whether a query of this pass does not attend to every page in a layer."""
        limits = layer.sparse_from, layer.sparse_decode_from
        return any(
            limit is not None and at >= limit
            for limit, at in zip(limits, self._furthest, strict=True)
        )

    @cached_property
    def _furthest(self) -> tuple[int, int]:
        """Where the last page of a prompt begins, and of a decode step; -1: there is none."""
        last = [-1, -1]
        for length, decode in zip(self.seq_lens, self.decodes.tolist(), strict=True):
            last[decode] = max(last[decode], (length - 1) // PAGE_SIZE * PAGE_SIZE)
        return last[False], last[True]

    def blocks(self, layer: LayerPlan) -> list[QueryBlocks]:
        """The query blocks of a layer; layers of the same thresholds and refresh share them."""
        key = (layer.sparse_from, layer.sparse_decode_from, layer.refresh)
        if key not in self._blocks:
            self._blocks[key] = plan_blocks(
                self.prefix_lens,
                self.seq_lens,
                self.page_table,
                decodes=self.decodes,
                sparse_from=layer.sparse_from,
                sparse_decode_from=layer.sparse_decode_from,
                nodes_from=None if self.nodes is None else self.nodes.start,
                node_table=None if self.nodes is None else self.nodes.table,
                reuses=self.reuses.get(layer.refresh),
            )
        return self._blocks[key]


def page_tables(req_to_token: Tensor, rows: Tensor, longest: int) -> Tensor:
    """The physical pages [B, P] of requests in rows [B] of SGLang's table of slots."""
    # a page is 64 slots in a row, so its first token tells where it is
    first_slots = req_to_token[:, :longest:PAGE_SIZE].index_select(0, rows)
    return first_slots.long() // PAGE_SIZE


def completed_pages(prefix_lens: list[int], seq_lens: list[int], page_table: Tensor) -> Tensor:
    """[C]: the physical pages [B, P] that the tokens prefix .. seq - 1 fill to their last slot."""
    device = page_table.device
    page = torch.arange(page_table.shape[1], device=device)
    first = torch.tensor(prefix_lens, device=device)[:, None] // PAGE_SIZE
    end = torch.tensor(seq_lens, device=device)[:, None] // PAGE_SIZE
    return page_table[(page >= first) & (page < end)]
