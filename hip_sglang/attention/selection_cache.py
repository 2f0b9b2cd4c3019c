"""What decode steps chose, for the steps after them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from hip_kernels.layout import PAGE_SIZE, Choice
from torch import Tensor
from torch.nn.functional import pad

# no position of a request, nor the one before its first
_NONE = -2


class SelectionCache:
    """The choices of running requests, by SGLang's request row and by layer.

    A step chooses anew when its length divides by the layer's ``refresh``, and when the step before
    it in the same row was not at the position before, and sparse: so after a prompt, and every new
    owner of a row brings one, as a retraction does. It follows from the request alone, never from
    who else is in the batch. What is kept are positions within the request: SGLang may move its
    pages. Nothing here asks a tensor for a number, so a CUDA graph can hold a step.
    """

    def __init__(
        self, rows: int, budgets: Mapping[int, int], device: torch.device | str = "cpu"
    ) -> None:
        """budgets: how many entries of a choice each layer has."""
        self._budgets = budgets
        # the position of the sparse decode step that each row saw last; one more for padding
        self._last = torch.full((rows + 1,), _NONE, device=device)
        self._choices: dict[int, Choice] = {}

    def step(self, rows: Tensor, decodes: Tensor, seq_lens: Tensor, sparse_from: int) -> Tensor:
        """Which requests [B] of a forward pass have a choice to use again; call it once a pass.

        Request rows, which of them are decode steps, and their lengths, [B]. ``sparse_from``:
        decode steps in pages from this position on are sparse.
        """
        position = seq_lens - 1
        held = self._last[rows] == position - 1
        sparse = decodes & (position // PAGE_SIZE * PAGE_SIZE >= sparse_from)
        # padding is one token long, and names a row that may be another's
        row = rows.where(position > 0, len(self._last) - 1)
        self._last[row] = position.where(sparse, _NONE)
        return decodes & held

    def all_rows(self, layer_id: int, kv_heads: int, group: int) -> Choice:
        """What stands in every row, for kernels that read and write their own."""
        if layer_id not in self._choices:
            rows, device = len(self._last) - 1, self._last.device
            entries = torch.full((rows, kv_heads, self._budgets[layer_id]), -1, device=device)
            self._choices[layer_id] = Choice(
                entries, torch.zeros(rows, kv_heads, group, device=device)
            )
        return self._choices[layer_id]

    def keep(self, layer_id: int, rows: Tensor, choice: Choice) -> None:
        """Of requests in rows [N]."""
        held = self.all_rows(layer_id, *choice.correction.shape[1:])
        # a batch of short contexts has no more places than pages
        spare = held.entries.shape[-1] - choice.entries.shape[-1]
        held.entries[rows] = pad(choice.entries, (0, spare), value=-1)
        held.correction[rows] = choice.correction

    def get(self, layer_id: int, rows: Tensor) -> Choice:
        """What requests in rows [N] chose."""
        held = self._choices[layer_id]
        return Choice(held.entries[rows], held.correction[rows])


def reused(held: Tensor, seq_lens: Tensor, refresh: int) -> Tensor:
    """Of requests [B] that have a choice, those that use it again in layers of this ``refresh``."""
    return held & (seq_lens % refresh != 0)
