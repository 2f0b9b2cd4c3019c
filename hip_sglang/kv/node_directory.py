"""Where nodes are: summaries of ``NODE_PAGES`` complete pages in a row."""

from __future__ import annotations

import torch
from hip_kernels.layout import NODE_PAGES
from torch import Tensor


class NodeDirectory:
    """A place for each node that a query block needs, by the physical page that the node ends at.

    Nodes belong to a prefix, not to a request: SGLang's radix cache frees pages from their end
    on, so what lies before a page stays what it was for as long as the page does. They are made
    when a block first needs them. There are places enough: requests that part after a
    common prefix share all nodes but the one in which they part, so those of one batch are never
    more than an eighth of the pages and one a request.
    """

    def __init__(self, pages: int, requests: int, device: torch.device | str) -> None:
        self.places = pages // NODE_PAGES + requests
        self.device = device
        # each has one entry more, the last, which is what -1 leads to
        self._place = torch.full((pages + 1,), -1, device=device)  # of the node that ends at a page
        self._end = torch.full((self.places + 1,), -1, device=device)  # where the node there ends

    def forget(self, pages: Tensor) -> None:
        """Physical pages [C] were written anew: what ended there is gone. -1 is no page."""
        # an assignment would wait for the GPU, to bring it the number
        self._end.index_fill_(0, self._place[pages], -1)
        self._place.index_fill_(0, pages, -1)

    def find(self, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Ends [K] of all nodes that a step needs -> their places [K], and which [K] are new."""
        new = self._place[ends] < 0
        if bool(new.any()):
            self._admit(torch.unique(ends[new]), needed=self._place[ends[~new]])
        return self._place[ends], new

    def _admit(self, ends: Tensor, needed: Tensor) -> None:
        free = torch.ones(self.places, dtype=torch.bool, device=ends.device)
        free[needed] = False
        spare = free.nonzero().flatten()
        # first what holds nothing, then what no running request asked for
        spare = spare[(self._end[spare] >= 0).int().argsort(stable=True)][: len(ends)]
        self._place[self._end[spare]] = -1
        self._end[spare] = ends
        self._place[ends] = spare
