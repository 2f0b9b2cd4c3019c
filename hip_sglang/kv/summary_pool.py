"""Summaries of pages and nodes beside SGLang's own KV pool, one set a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from hip_kernels.layout import PAGE_SIZE, Summaries

if TYPE_CHECKING:
    from hip_sglang.config import LayerPlan


class SummaryPool:
    """Summaries by the pool's physical pages, for the layers that may prune, and of nodes."""

    def __init__(self, pool: Any, layers: Mapping[int, LayerPlan], nodes: int) -> None:
        """pool: SGLang's or ours; layers by their global id; nodes: places for them."""
        self._layers: dict[int, Summaries] = {}
        self._nodes: dict[int, Summaries] = {}
        self.pages = pages_of(pool)
        for layer_id, plan in layers.items():
            for held, count, means in (
                (self._layers, self.pages, plan.means), (self._nodes, nodes, 1)
            ):  # fmt: skip
                held[layer_id] = Summaries.empty(
                    count if plan.prunes else 0,
                    pool.head_num,
                    pool.head_dim,
                    pool.v_head_dim,
                    means=means,
                    # half precision otherwise: float16 keeps more of a mean than bfloat16 does
                    dtype=torch.float32 if pool.dtype == torch.float32 else torch.float16,
                    device=pool.device,
                )

    def pages_of(self, layer_id: int) -> Summaries:
        """The summaries of a layer's pages."""
        return self._layers[layer_id]

    def nodes_of(self, layer_id: int) -> Summaries:
        """The summaries of a layer's nodes, by their place in the ``NodeDirectory``."""
        return self._nodes[layer_id]

    @property
    def nbytes(self) -> int:
        held = [*self._layers.values(), *self._nodes.values()]
        return sum(summaries.nbytes for summaries in held)


def pages_of(pool: Any) -> int:
    """How many physical pages a pool has, SGLang's page of padding among them."""
    return int(pool.size) // PAGE_SIZE + 1
