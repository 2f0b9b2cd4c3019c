"""What is measured: models' attention shapes, and the state of their layers on a device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hip_kernels.blocks import plan_blocks
from hip_kernels.layout import NODE_PAGES, PAGE_SIZE, QueryBlocks, SparsePlan, Summaries
from hip_kernels.stored import PagedKV
from hip_kernels.summarize.triton import pool, summarize
from torch import Tensor

MEANS = 4
# what nobody has written must never be read into a result
_RUBBISH = 400.0


@dataclass(frozen=True)
class Model:
    """The attention of one model, or of one rank's part of it."""

    name: str
    heads: int
    kv_heads: int
    width: int

    def __str__(self) -> str:
        return f"{self.name} ({self.heads}/{self.kv_heads}/{self.width})"


MODELS = (
    Model("Llama-3.1-8B", 32, 8, 128),
    Model("Qwen3-32B", 64, 8, 128),
    Model("Llama-3.1-70B/TP8", 8, 1, 128),
)
TINY = Model("tiny", 4, 2, 32)


@dataclass(frozen=True)
class Cell:
    """One shape: ``batch`` requests that each bring ``chunk`` tokens up to ``context``."""

    model: Model
    dtype: torch.dtype
    context: int
    batch: int = 1
    chunk: int = 1
    nodes: bool = False  # what prunes searches through nodes

    @property
    def decodes(self) -> bool:
        return self.chunk == 1

    @property
    def pages(self) -> int:
        return -(-self.context // PAGE_SIZE)

    @property
    def stored(self) -> torch.dtype:
        """What summaries are stored in, as the server stores them."""
        return torch.float32 if self.dtype == torch.float32 else torch.float16

    @property
    def page_bytes(self) -> int:
        """Of one page of one request: its keys and values, and its summary."""
        of_head = 2 * PAGE_SIZE * self.dtype.itemsize + (MEANS + 2) * self.stored.itemsize
        return of_head * self.model.kv_heads * self.model.width

    def __str__(self) -> str:
        rows = "decode" if self.decodes else f"chunk {self.chunk:,}"
        how = ", nodes" if self.nodes else ""
        return f"{self.model}, {rows} at {self.context:,}, batch {self.batch}{how}"


@dataclass(frozen=True)
class Layer:
    """One layer's pool and the queries that ask it."""

    query: Tensor  # [T, Hq, D]
    kv: PagedKV
    summaries: Summaries
    out: Tensor  # [T, Hq, D]
    nodes: Summaries | None = None


@dataclass(frozen=True)
class Case:
    """Several layers with the same page table, so that each finds the L2 cache cold."""

    cell: Cell
    plan: SparsePlan
    layers: list[Layer]
    table: Tensor  # [B, P] logical -> physical
    lengths: list[int]
    shared: bool  # all requests read the same pages

    @property
    def scale(self) -> float:
        return float(self.cell.model.width**-0.5)

    @classmethod
    def make(
        cls,
        cell: Cell,
        plan: SparsePlan,
        device: torch.device,
        *,
        copies: int = 1,
        shared: bool = False,
        shuffled: bool = True,
        lengths: list[int] | None = None,
    ) -> Case:
        """Random keys that drift, so that pages differ and a budget has something to choose.

        Pages lie in a random order, as in a server that has run for a while.
        """
        owners = 1 if shared else cell.batch
        count = owners * cell.pages
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(count, generator=generator) if shuffled else torch.arange(count)
        table = order.view(owners, -1).expand(cell.batch, -1).contiguous()
        lengths = lengths or [cell.context] * cell.batch
        full = [row[: length // PAGE_SIZE] for row, length in zip(table, lengths, strict=True)]
        complete = torch.cat(full[:owners]).to(device)
        torch.manual_seed(0)
        layers = [_layer(cell, count, complete, device) for _ in range(copies)]
        case = cls(cell, plan, layers, table.to(device), lengths, shared)
        if cell.nodes:
            case = replace(case, layers=[case.with_nodes(layer) for layer in layers])
        if lengths != [cell.context] * cell.batch:
            case.spoil_the_rest()
        return case

    def blocks(self, sparse: bool) -> list[QueryBlocks]:
        threshold = 0 if sparse else None
        return plan_blocks(
            [length - self.cell.chunk for length in self.lengths],
            self.lengths,
            self.table,
            sparse_from=threshold,
            sparse_decode_from=threshold,
            nodes_from=0 if self.cell.nodes and sparse else None,
            node_table=self.node_table,
        )

    @property
    def node_table(self) -> Tensor:
        """[B, J] where each request's nodes are."""
        count = self.cell.pages // NODE_PAGES
        owners = torch.arange(self.cell.batch, device=self.table.device) * (not self.shared)
        return owners[:, None] * count + torch.arange(count, device=self.table.device)

    def with_nodes(self, layer: Layer) -> Layer:
        """Nodes of all complete pages, request by request."""
        heads, _, _, width = layer.summaries.mean.shape
        count = self.cell.pages // NODE_PAGES
        owners = 1 if self.shared else self.cell.batch
        pages = self.table[:owners, : count * NODE_PAGES].reshape(-1, NODE_PAGES)
        nodes = Summaries.empty(
            len(pages), heads, width, width, means=1,
            dtype=layer.summaries.mean.dtype, device=pages.device,
        )  # fmt: skip
        pool(layer.summaries, pages, torch.arange(len(pages), device=pages.device), nodes)
        return replace(layer, nodes=nodes)

    def on_host(self) -> Case:
        """The same numbers in float32 on the CPU, where the reference computes with them."""

        def host(tensor: Tensor) -> Tensor:
            return tensor.float().cpu()

        layers = [
            Layer(
                host(of.query),
                replace(of.kv, key=host(of.kv.key), value=host(of.kv.value)),
                Summaries(*map(host, of.summaries.tensors)),
                host(of.out),
                of.nodes and Summaries(*map(host, of.nodes.tensors)),
            )
            for of in self.layers
        ]
        return replace(self, layers=layers, table=self.table.cpu())

    def spoil_the_rest(self) -> None:
        """Overwrite what lies past the requests' ends."""
        position = torch.arange(self.cell.pages * PAGE_SIZE, device=self.table.device)
        slots = (self.table * PAGE_SIZE).repeat_interleave(PAGE_SIZE, 1) + position % PAGE_SIZE
        for row, length in zip(slots, self.lengths, strict=True):
            for layer in self.layers:
                layer.kv.key[row[length:]] = _RUBBISH
                layer.kv.value[row[length:]] = _RUBBISH


def _layer(cell: Cell, pages: int, complete: Tensor, device: torch.device) -> Layer:
    model = cell.model
    shape = (pages * PAGE_SIZE, model.kv_heads, model.width)
    key, value = (torch.empty(shape, dtype=cell.dtype, device=device).normal_() for _ in "kv")
    topics = torch.randn(pages, 1, *shape[1:], device=device).to(cell.dtype)
    key.view(pages, PAGE_SIZE, *shape[1:]).add_(topics)
    kv = PagedKV(key, value)
    summaries = Summaries.empty(
        pages, *shape[1:], model.width, means=MEANS, dtype=cell.stored, device=device
    )
    for tensor in summaries.tensors:
        tensor.fill_(_RUBBISH)
    summarize(kv, complete, summaries)
    # scaled so that attention is neither uniform nor a single token
    shape = (cell.batch * cell.chunk, model.heads, model.width)
    query = 2 * torch.randn(shape, device=device).to(cell.dtype)
    return Layer(query, kv, summaries, torch.empty_like(query))
