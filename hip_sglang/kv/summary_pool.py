"""Page summaries beside SGLang's own KV pool, one set a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from hip_kernels.layout import PAGE_SIZE, Summaries

if TYPE_CHECKING:
    from hip_sglang.config import LayerPlan


class SummaryPool:
    """Summaries by the pool's physical pages, for the layers that may prune."""

    def __init__(self, pool: Any, layers: Mapping[int, LayerPlan]) -> None:
        """pool: SGLang's ``KVCache``; layers by their global id."""
        self._layers: dict[int, Summaries] = {}
        self.pages = 0
        for layer_id, plan in layers.items():
            key, value = pool.get_kv_buffer(layer_id)
            self.pages = key.shape[0] // PAGE_SIZE
            self._layers[layer_id] = Summaries.empty(
                self.pages if plan.prunes else 0,
                key.shape[1],
                key.shape[2],
                value.shape[2],
                means=plan.means,
                # half precision otherwise: float16 keeps more of a mean than bfloat16 does
                dtype=torch.float32 if key.dtype == torch.float32 else torch.float16,
                device=key.device,
            )

    def __getitem__(self, layer_id: int) -> Summaries:
        return self._layers[layer_id]

    @property
    def nbytes(self) -> int:
        return sum(summaries.nbytes for summaries in self._layers.values())
