"""Keys and values of one layer, wherever they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hip_kernels.layout import PAGE_SIZE, products

_ANY = 1 << 30


class StoredKV(ABC):
    """Keys and values of one layer, wherever they are: what the reference asks of them.

    Slots count the tokens of the whole pool; a run is ``tokens`` slots in a row, within a page.
    """

    key_scale: float  # a key is the stored row times this
    value_scale: float

    @property
    @abstractmethod
    def kv_heads(self) -> int: ...

    @abstractmethod
    def together(self, pages: Tensor) -> PagedKV:
        """The pages [P] of one request as a pool of its own, in their order."""

    @abstractmethod
    def whole(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Complete pages [C], physical, as stored: keys [C, 64, Hkv, D] and values."""

    @abstractmethod
    def _keys(self, slots: Tensor, tokens: int) -> Iterator[Tensor]:
        """Runs from slots [Hkv, N, K], a head at a time: [N, K * tokens, D] in float32."""

    @abstractmethod
    def _values(self, slots: Tensor, tokens: int) -> Iterator[Tensor]:
        """The same of values."""

    @abstractmethod
    def steps_at_once(self, pages: int) -> int:
        """How many decode steps, each of so many pages, may be attended together."""

    @abstractmethod
    def held(self, physical: Tensor) -> Tensor:
        """Which of pages [Hkv, N, K] are on the device."""

    @abstractmethod
    def offer(self, chosen: Tensor, physical: Tensor, *, fresh: bool, waits: bool) -> Tensor:
        """Logical pages [Hkv, N, K] that are chosen -> those to attend to; -1 is none.

        ``physical`` is where they are; ``fresh`` says that they were chosen just now, ``waits``
        that those which are not here yet must come.
        """

    @abstractmethod
    def bring(self, physical: Tensor, real: Tensor) -> None:
        """Pages [Hkv, N, K] are about to be read as a whole, where ``real``."""

    def scores(
        self, query: Tensor, slots: Tensor, tokens: int, out: Tensor | None = None
    ) -> Tensor:
        """Query times keys: query [Hkv, N, M, D]; runs of ``tokens`` keys from slots [Hkv, N, K].

        Returns ``out`` [Hkv, N, M, K * tokens] in float32. Head by head, so that what is gathered
        stays in the cache.
        """
        if out is None:
            out = query.new_empty(*query.shape[:3], slots.shape[2] * tokens)
        keys = self._keys(slots, tokens)
        for q, key, head in zip(query * self.key_scale, keys, out, strict=True):
            products(q, key, head)
        return out

    def mix(self, weight: Tensor, slots: Tensor, tokens: int) -> Tensor:
        """Weighted sums of values: weight [Hkv, N, M, K * tokens] -> [Hkv, N, M, Dv]."""
        values = self._values(slots, tokens)
        found = torch.stack([w @ value for w, value in zip(weight, values, strict=True)])
        return found.mul_(self.value_scale)


@dataclass(frozen=True)
class PagedKV(StoredKV):
    """Keys and values of one layer as SGLang pools them, one row a token slot, in any dtype."""

    key: Tensor  # [pages * 64, Hkv, D]
    value: Tensor  # [pages * 64, Hkv, Dv]
    key_scale: float = 1.0
    value_scale: float = 1.0

    @property
    def kv_heads(self) -> int:
        return self.key.shape[1]

    @property
    def nbytes(self) -> int:
        return self.key.nbytes + self.value.nbytes

    def together(self, pages: Tensor) -> PagedKV:
        if bool((pages.diff() == 1).all()):
            # a view costs nothing, a copy of a long context costs a great deal
            run = slice(int(pages[0]) * PAGE_SIZE, (int(pages[-1]) + 1) * PAGE_SIZE)
            return replace(self, key=self.key[run], value=self.value[run])
        key, value = self.whole(pages)
        return replace(self, key=key.flatten(0, 1), value=value.flatten(0, 1))

    def whole(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        def stored(rows: Tensor) -> Tensor:
            return rows.view(-1, PAGE_SIZE, *rows.shape[1:])[pages]

        return stored(self.key), stored(self.value)

    def steps_at_once(self, pages: int) -> int:
        return _ANY

    def held(self, physical: Tensor) -> Tensor:
        return physical >= 0

    def offer(self, chosen: Tensor, physical: Tensor, *, fresh: bool, waits: bool) -> Tensor:
        return chosen

    def bring(self, physical: Tensor, real: Tensor) -> None:
        return

    def _keys(self, slots: Tensor, tokens: int) -> Iterator[Tensor]:
        return _each_head(self.key, slots, tokens)

    def _values(self, slots: Tensor, tokens: int) -> Iterator[Tensor]:
        return _each_head(self.value, slots, tokens)


def _each_head(rows: Tensor, slots: Tensor, tokens: int) -> Iterator[Tensor]:
    """Runs of ``tokens`` rows from slots [Hkv, N, K] -> a head at a time, [N, K * tokens, D].

    In float32, and overwritten by the next head's: memory that is fresh at each call costs more
    than what is copied into it.
    """
    heads, width = rows.shape[1:]
    run = torch.arange(tokens, device=slots.device)
    head = torch.arange(heads, device=slots.device).view(-1, 1, 1, 1)
    index = ((slots.unsqueeze(-1) + run) * heads + head).flatten(1)
    pool = rows.reshape(-1, width)
    gathered = rows.new_empty(index.shape[1], width)
    for each in index:
        torch.index_select(pool, 0, each, out=gathered)
        yield gathered.view(slots.shape[1], -1, width).float()
