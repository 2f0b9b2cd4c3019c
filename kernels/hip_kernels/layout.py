"""The tensors that travel, and their shapes.

Units: a page is 64 consecutive tokens of one request (or 32, or 16: ``page_size``). A *physical*
page is a place in the pool (slot = page * 64 + offset); a *logical* page is a position within the
request (page p holds the tokens 64p .. 64p + 63). A page table maps the second to the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from hip_kernels.page_size import page_size

PAGE_SIZE = page_size()
SUB_PAGES = 4
NODE_PAGES = 8
FEW_ROWS = 16
# channels of a head whose blocks of a prompt have kernels: of wider ones they spill
WIDEST_OF_BLOCKS = 256

Strategy = Literal["summary", "tree"]
Remainder = Literal["harmonic", "log_cosh", "log_i0", "quadratic", "mean", "none"]
# those that kernels have, by their number there: no guard, Q, and Q L / (Q + L)
GUARDS = {"none": 0, "mean": 0, "quadratic": 1, "harmonic": 2}


@dataclass(frozen=True)
class SparsePlan:
    """What one layer attends exactly, in pages, and how it estimates the rest."""

    sink_pages: int = 1
    window_pages: int = 16
    budget_pages: int = 32
    remainder: Remainder = "harmonic"
    second_look: int = 0  # decode: choose by real keys, of this many times the budget
    parts: int = 1  # what a second look chooses: pages, or of sub-pages, so many a page, as many
    strategy: Strategy = "summary"  # tree: HiP as published, which never looks at summaries
    beam: int = 128  # nodes whose pages are weighed, where a block searches through nodes
    top_p: float = 1.0  # choose no more pages than hold this share of the estimated mass
    logit_cap: float = 0.0  # of the model: logits are cap * tanh(logit / cap); 0: they are not

    @property
    def exact_pages(self) -> int:
        """The most pages that one query block attends exactly, its own page included."""
        return self.sink_pages + self.budget_pages + self.window_pages + 1

    @property
    def entries(self) -> int:
        """The most pages, or sub-pages, that a decode step chooses."""
        return self.budget_pages * self.parts

    def with_fixed_pages(self, chosen: Tensor, page: Tensor, parts: int = 1) -> Tensor:
        """What blocks in ``page`` [N] attend exactly, in order: sink, chosen, window, own.

        chosen [N, Hkv, K] logical pages -> [N, Hkv, sink + K + window + 1]; -1 is padding. Or all
        of it in parts of pages (``Choice.entries``).
        """
        own = page[:, None]
        sink = torch.arange(self.sink_pages, device=page.device)
        window = own - torch.arange(self.window_pages, -1, -1, device=page.device)
        # a block inside the sink still attends to its own page
        window = window.where((window >= self.sink_pages) | (window == own), -1)
        fixed = (sink.where(sink < own, -1), window)
        part = torch.arange(parts, device=page.device)
        first, last = (
            (pages.unsqueeze(-1) * parts + part).where(pages.unsqueeze(-1) >= 0, -1).flatten(1)
            for pages in fixed
        )
        first, last = (of[:, None].expand(-1, chosen.shape[1], -1) for of in (first, last))
        return torch.cat([first, chosen, last], -1)

    def of_rows(self, rows: int) -> SparsePlan:
        """That of blocks of so many rows: only one row by itself looks again."""
        return self if rows == 1 else replace(self, second_look=0, parts=1)

    @property
    def has_kernels(self) -> bool:
        """Whether kernels prune so; elsewise only the reference does."""
        return self.strategy == "summary" and self.remainder in GUARDS

    @property
    def reads_summaries(self) -> bool:
        return self.strategy == "summary" or self.remainder != "none"


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """``cap * tanh(logits / cap)``, in place; 0 caps nothing."""
    return logits.div_(cap).tanh_().mul_(cap) if cap > 0 else logits


def products(query: Tensor, key: Tensor, out: Tensor | None = None) -> Tensor:
    """query [B, M, D], key [B, T, D] -> [B, M, T]."""
    if out is None:
        out = query.new_empty(*query.shape[:2], key.shape[1])
    if query.shape[1] < FEW_ROWS:
        # with few rows a matrix product takes the other order twice as fast on a CPU
        return out.copy_((key @ query.transpose(1, 2)).transpose(1, 2))
    return torch.bmm(query, key.transpose(1, 2), out=out)


@dataclass(frozen=True)
class Summaries:
    """What is kept of every page of one layer, by physical page.

    Made of the stored keys and values when a page's 64th token is written, never before. The
    means are of L = 4 sub-pages of 16 tokens, or, where memory is short, of the page (L = 1).
    """

    mean: Tensor  # [Hkv, L, pages, D] mean keys
    sigma: Tensor  # [Hkv, pages, D] standard deviation of the keys about those means, per channel
    value: Tensor  # [Hkv, pages, Dv] mean value

    @classmethod
    def empty(
        cls,
        pages: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        *,
        means: int = SUB_PAGES,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Summaries:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            mean=zeros(kv_heads, means, pages, head_dim),
            sigma=zeros(kv_heads, pages, head_dim),
            value=zeros(kv_heads, pages, value_dim),
        )

    @property
    def pages(self) -> int:
        return self.sigma.shape[1]

    def each_head(self, pages: Tensor) -> Iterator[Summaries]:
        """Keys of physical pages [Hkv, N, S], a head at a time: mean [N, L, S, D], no values.

        In float32, and overwritten by the next head's (see ``PagedKV``).
        """
        heads, means, _, width = self.mean.shape
        count = pages[0].numel()
        mean = self.mean.new_empty(means, count, width)
        sigma = self.sigma.new_empty(count, width)
        for head in range(heads):
            at = pages[head].flatten()
            torch.index_select(self.mean[head], 1, at, out=mean)
            torch.index_select(self.sigma[head], 0, at, out=sigma)
            shape = (*pages.shape[1:], width)
            yield Summaries(
                mean.float().view(means, *shape).transpose(0, 1),
                sigma.float().view(shape),
                sigma.new_empty(0),
            )

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.mean, self.sigma, self.value

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def take(self, pages: slice | Tensor) -> Summaries:
        """The summaries of some physical pages, in float32: a slice is a view, an index copies."""

        def of(tensor: Tensor) -> Tensor:
            if isinstance(pages, slice):
                return tensor[..., pages, :].float()
            return tensor.index_select(-2, pages).float()

        return Summaries(*map(of, self.tensors))


@dataclass(frozen=True)
class LocalPages:
    """The pool pages (or nodes) that some query blocks can see, and a table that leads to them.

    Found when first asked for: kernels go by the physical table and never ask.
    """

    physical: Tensor  # [N | 1, P] the blocks' table

    @property
    def pages(self) -> slice | Tensor:
        """Physical pages: a run of the pool, or an index [S]."""
        return self._found[0]

    @property
    def table(self) -> Tensor:
        """[N | 1, P] logical -> position in ``pages``."""
        return self._found[1]

    @cached_property
    def _found(self) -> tuple[slice | Tensor, Tensor]:
        table = self.physical
        low, high = int(table.min()), int(table.max()) + 1
        # scoring a run of the pool where it lies reads each summary once; gathering copies it first
        if high - low <= 2 * table.numel():
            return slice(low, high), table - low
        pages, local = torch.unique(table, return_inverse=True)
        return pages, local

    def trim(self, blocks: slice, pages: int) -> LocalPages:
        """What some of the blocks see, up to a logical page; ``pages`` stay those of all."""
        trimmed = LocalPages(_trim(self.physical, blocks, pages))
        vars(trimmed)["_found"] = (self.pages, _trim(self.table, blocks, pages))
        return trimmed


def _trim(table: Tensor, blocks: slice, pages: int) -> Tensor:
    return (table if table.shape[0] == 1 else table[blocks])[:, :pages]


@dataclass(frozen=True)
class QueryBlocks:
    """Query blocks that are computed together: N blocks of R rows (decode: R = 1).

    A prefill block holds the rows of one absolute multiple of 64, so that chunks and radix hits
    do not change which rows select together.
    """

    tokens: Tensor  # [N, R] index of each row in the flat batch; padding repeats a valid one
    position: Tensor  # [N, R] absolute position of each row; -1 is padding
    page: Tensor  # [N] the logical page that holds the block; pages before it are its context
    table: Tensor  # [N | 1, P] physical pages in logical order; 1 when all blocks share a request
    local: LocalPages | None  # where the context's summaries are; None keeps every page
    request: Tensor  # [N | 1] which request of the batch each block belongs to
    nodes: LocalPages | None = None  # where those of its nodes are; None weighs every page
    reuses: bool = False  # attends to what an earlier step of its request chose

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def split(self, blocks: int) -> Iterator[QueryBlocks]:
        """Waves of at most ``blocks`` query blocks, each with no more of the table than it sees."""
        for start in range(0, len(self), blocks):
            part = slice(start, start + blocks)
            page = self.page[part]
            seen = int(page.max()) + 1

            yield QueryBlocks(
                tokens=self.tokens[part],
                position=self.position[part],
                page=page,
                table=_trim(self.table, part, seen),
                local=self.local and self.local.trim(part, seen),
                request=self.request if len(self.request) == 1 else self.request[part],
                nodes=self.nodes and self.nodes.trim(part, seen // NODE_PAGES),
                reuses=self.reuses,
            )


@dataclass(frozen=True)
class Choice:
    """What a step found, and, where it is of whole pages, a later step may use again."""

    entries: Tensor  # [N, Hkv, K] chosen: logical page * parts + part, in order; -1 is padding
    correction: Tensor  # [N, Hkv, M] to be added to the logits of estimated pages

    @classmethod
    def empty(
        cls, rows: int, kv_heads: int, group: int, plan: SparsePlan, device: torch.device | str
    ) -> Choice:
        """Room for the choices of decode steps in rows that are theirs."""
        entries = torch.empty(rows, kv_heads, plan.entries, dtype=torch.int64, device=device)
        correction = torch.empty(rows, kv_heads, group, dtype=torch.float32, device=device)
        return cls(entries, correction)

    def split(self, blocks: int) -> Iterator[Choice]:
        """The choices of waves of blocks (``QueryBlocks.split``)."""
        for start in range(0, len(self.entries), blocks):
            part = slice(start, start + blocks)
            yield Choice(self.entries[part], self.correction[part])


@dataclass(frozen=True)
class Selection:
    """What each query block attended to."""

    choice: Choice
    estimated: Tensor  # [N, Hkv, M] the share of each row's softmax that went to estimated pages
    page: Tensor  # [N] the logical page that holds the block
    plan: SparsePlan
    held: Tensor | None = None  # [N, Hkv, K] which chosen entries were on the device before

    @property
    def chosen(self) -> Tensor:
        """How many pages were chosen, [N, Hkv]: of one of four parts, a quarter."""
        return (self.choice.entries >= 0).sum(-1) / self.plan.parts

    @property
    def exact(self) -> Tensor:
        """How many pages were attended exactly, [N, Hkv], the block's own included."""
        none = self.choice.entries[..., :0]
        return (self.plan.with_fixed_pages(none, self.page) >= 0).sum(-1) + self.chosen
