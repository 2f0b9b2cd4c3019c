"""A record of which pages decode steps attended, for pictures and for debugging."""

from __future__ import annotations

import json
from pathlib import Path

from hip_kernels.layout import QueryBlocks, Selection

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
        ends, rows = [], 0
        for prefix, length in zip(plan.prefix_lens, plan.seq_lens, strict=True):
            rows += length - prefix
            ends.append(rows - 1)
        owner = {token: request for request, token in enumerate(ends)}
        exact = (selection.pages >= 0).sum(-1).float().mean(-1).tolist()
        for n, token in enumerate(blocks.tokens[:, 0].tolist()):
            request = owner[token]
            visible = int(blocks.page[n])
            chosen = [[p for p in head if p >= 0] for head in selection.chosen[n].tolist()]
            record = {
                "rid": plan.request_ids[request] if plan.request_ids else "",
                "layer": layer_id,
                "position": int(blocks.position[n, 0]),
                "visible_pages": visible,
                "sink_pages": selection.sink_pages,
                "window_pages": selection.window_pages,
                "chosen": chosen,
                "kv_read_share": round(layer.share_read(visible, exact[n]), 6),
            }
            self._file.write(json.dumps(record) + "\n")
        self._file.flush()
