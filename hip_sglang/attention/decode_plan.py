"""A pass of decode steps by kernels: made of tensors alone, so that a CUDA graph can make it anew.

``ForwardPlan`` is for every other pass. What only the host can find, which nodes there are, is kept
up beside the graph, by ``NodeTables``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from hip_kernels.layout import NODE_PAGES, PAGE_SIZE
from hip_kernels.steps import NO_PAGE, DecodeSteps
from torch import Tensor

from hip_sglang.attention.plan import NodePlan, page_tables
from hip_sglang.attention.selection_cache import reused

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from hip_sglang.attention.selection_cache import SelectionCache
    from hip_sglang.config import HipConfig, LayerPlan
    from hip_sglang.kv.node_directory import NodeDirectory


@dataclass(frozen=True)
class DecodePlan:
    """The batch as kernels see it, padding of a graph included: requests of one token."""

    steps: DecodeSteps  # as most layers take them
    reuses: Mapping[int, Tensor]  # by a layer's ``refresh``, [B] int32
    completed: Tensor  # [B] physical pages whose 64th token this pass writes; -1 is none

    @classmethod
    def of(
        cls,
        batch: ForwardBatch,
        req_to_token: Tensor,
        config: HipConfig,
        cache: SelectionCache | None,
        node_table: Tensor | None,
    ) -> DecodePlan:
        """req_to_token: SGLang's table [rows, context]; node_table [B, J] as ``NodeTables`` has."""
        rows, length = batch.req_pool_indices.long(), batch.seq_lens.long()
        position = length - 1
        page = position // PAGE_SIZE
        table = page_tables(req_to_token, rows, req_to_token.shape[1])
        own = table.gather(1, page[:, None]).squeeze(1)
        # without a cache every step chooses anew, into a row that only this pass has
        token = row = torch.arange(len(rows), device=rows.device)
        by_refresh = {config.refresh: torch.zeros_like(row, dtype=torch.int32)}
        if cache is not None:
            row = rows
            held = cache.step(rows, torch.ones_like(row).bool(), length, config.start)
            by_refresh = {n: reused(held, length, n).int() for n in config.refreshes}
        steps = DecodeSteps(
            token=token,
            position=position,
            page=page,
            table=table,
            row=row,
            reuses=by_refresh[config.refresh],
            nodes=node_table,
            nodes_from=first_page(config.nodes_from),
        )
        return cls(steps, by_refresh, own.where(length % PAGE_SIZE == 0, -1))

    def of_layer(self, layer: LayerPlan) -> DecodeSteps:
        """The steps as a layer takes them."""
        return replace(
            self.steps,
            reuses=self.reuses[layer.refresh],
            sparse_from=first_page(layer.sparse_decode_from),
        )


def first_page(position: int | None) -> int:
    """The first page that begins at a position or later; None: there is none."""
    return NO_PAGE if position is None else -(-position // PAGE_SIZE)


class NodeTables:
    """Where the nodes of running requests are, kept up from one decode pass to the next.

    A pass that finds nothing changed asks no tensor for a number. Something has, when a request has
    filled a node, when others are running, and when a prompt came between: it may be a new request
    that took a row, and its last row may have taken the place of a node.
    """

    def __init__(
        self,
        directory: NodeDirectory,
        start: int,
        requests: int,
        pages: int,
        make: Callable[[NodePlan], None],
        *,
        in_turn: bool = False,
    ) -> None:
        """make: has the new nodes of a plan summarised, in every layer.

        ``in_turn``: passes of several batches alternate, as with pipeline parallelism, so that
        nothing follows from the one before.
        """
        self._directory = directory
        self._start = start
        self._make = make
        self._in_turn = in_turn
        device = directory.device
        self._table = torch.zeros(requests, pages // NODE_PAGES, dtype=torch.int64, device=device)
        self._lengths: list[int] | None = None

    def forget(self) -> None:
        """A pass that was not of decode steps came between."""
        self._lengths = None

    def update(self, seq_lens: list[int], rows: Tensor, req_to_token: Tensor) -> None:
        """Before a pass: make what its steps need that is not there, and find it."""
        before, self._lengths = self._lengths, seq_lens
        grown = before is not None and seq_lens == [length + 1 for length in before]
        filled = any((length - 1) % (NODE_PAGES * PAGE_SIZE) == 0 for length in seq_lens)
        if grown and not filled and not self._in_turn:
            return
        table = page_tables(req_to_token, rows, max(seq_lens, default=0))
        plan = NodePlan.of(self._directory, self._start, seq_lens, table)
        if plan is not None:
            self._make(plan)
            self._table[: len(seq_lens), : plan.table.shape[1]] = plan.table

    def of(self, batch: int) -> Tensor:
        """[B, J]: the table of a batch; past a request's last node anything."""
        return self._table[:batch]
