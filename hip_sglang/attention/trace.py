"""A record of which pages decode steps attended, for pictures and for debugging."""

from __future__ import annotations

import json
from pathlib import Path

from hip_kernels.layout import QueryBlocks, Selection
from torch import Tensor

from hip_sglang.attention.plan import ForwardPlan
from hip_sglang.config import LayerPlan


class SelectionTrace:
    """Appends one JSON line per sparse decode step and layer.

    Each tensor-parallel rank selects for its own KV heads, so ranks above 0 write beside the
    file: ``trace.jsonl``, ``trace.jsonl.rank1``, ...
    """

    def __init__(self, path: Path, rank: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        name = path.name if rank == 0 else f"{path.name}.rank{rank}"
        self._file = path.with_name(name).open("a", encoding="utf-8")

    def write(
        self,
        layer_id: int,
        layer: LayerPlan,
        plan: ForwardPlan,
        blocks: QueryBlocks,
        selection: Selection,
    ) -> None:
        if blocks.tokens.shape[1] != 1:  # a prefill block
            return
        exact = selection.exact.mean(-1).tolist()
        for n, request in enumerate(blocks.request.tolist()):
            visible = int(blocks.page[n])
            pages = selection.choice.entries[n] // selection.plan.parts
            held = pages if selection.held is None else pages.where(selection.held[n], -1)
            share = layer.share_read(visible, exact[n], chooses=not blocks.reuses)
            record = {
                "rid": plan.request_ids[request] if plan.request_ids else "",
                "layer": layer_id,
                "position": int(blocks.position[n, 0]),
                "visible_pages": visible,
                "sink_pages": selection.plan.sink_pages,
                "window_pages": selection.plan.window_pages,
                "chosen": real(pages),
                "held": real(held),
                "kv_read_share": round(share, 6),
            }
            self._file.write(json.dumps(record) + "\n")
        self._file.flush()


def real(pages: Tensor) -> list[list[int]]:
    """pages [Hkv, K], in order, -1 is padding -> those of each head, each once."""
    return [list(dict.fromkeys(page for page in head if page >= 0)) for head in pages.tolist()]
