"""What decode steps chose, for the steps after them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hip_kernels.layout import PAGE_SIZE, Choice
from torch import Tensor
from torch.nn.functional import pad


class SelectionCache:
    """The choices of running requests, by SGLang's request row and by layer.

    A step chooses anew when its length divides by ``refresh``, and when the step before it in the
    same row was not of the same request, at the position before, and sparse: so after a prompt, a
    retraction, an abort or another owner of the row. It follows from the request alone, never from
    who else is in the batch. What is kept are positions within the request: SGLang may move its
    pages.
    """

    def __init__(self, rows: int, budget_pages: int, refresh: int) -> None:
        self.refresh = refresh
        self.budget_pages = budget_pages
        self._owner: list[tuple[str, int] | None] = [None] * rows  # and the position of its step
        self._pages: dict[int, Tensor] = {}  # by layer: [rows, Hkv, budget]
        self._correction: dict[int, Tensor] = {}  # by layer: [rows, Hkv, G]

    def step(
        self,
        rows: Sequence[int],
        request_ids: Sequence[str],
        decodes: Sequence[bool],
        seq_lens: Sequence[int],
        sparse_from: int,
    ) -> Tensor:
        """Which requests [B] of a forward pass use again what they chose; call it once a pass.

        ``sparse_from``: decode steps in pages from this position on are sparse.
        """
        again = []
        for row, name, decode, length in zip(rows, request_ids, decodes, seq_lens, strict=True):
            held = self._owner[row] == (name, length - 2)
            again.append(decode and held and length % self.refresh != 0)
            sparse = (length - 1) // PAGE_SIZE * PAGE_SIZE >= sparse_from
            self._owner[row] = (name, length - 1) if decode and sparse else None
        return torch.tensor(again, dtype=torch.bool)

    def keep(self, layer_id: int, rows: Tensor, choice: Choice) -> None:
        """Of requests in rows [N]."""
        # a batch of short contexts has no more places than pages
        pages = pad(choice.pages, (0, self.budget_pages - choice.pages.shape[-1]), value=-1)
        for held, found in ((self._pages, pages), (self._correction, choice.correction)):
            if layer_id not in held:
                held[layer_id] = found.new_zeros(len(self._owner), *found.shape[1:])
            held[layer_id][rows] = found

    def get(self, layer_id: int, rows: Tensor) -> Choice:
        """What requests in rows [N] chose."""
        return Choice(self._pages[layer_id][rows], self._correction[layer_id][rows])
