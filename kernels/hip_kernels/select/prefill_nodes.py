"""Where a context is long: the nodes whose pages blocks of a prompt weigh one by one, on a GPU.

The same beam as ``weigh.weigh_nodes``, where the mathematics is.
"""

from __future__ import annotations

import torch
from torch import Tensor, float32

from hip_kernels.layout import NODE_PAGES, PAGE_SIZE, QueryBlocks, SparsePlan, Summaries
from hip_kernels.select.best import best_nodes
from hip_kernels.select.parts import Part
from hip_kernels.select.prefill import mass, score
from hip_kernels.select.weigh import edge_pages, mark, node_pages, node_range


def search(
    query: Tensor,
    summaries: Summaries,
    nodes: Summaries,
    blocks: QueryBlocks,
    plan: SparsePlan,
    scale: float,
) -> tuple[Part, Part]:
    """The nodes that are not in the beam, and the pages of those that are and of no node."""
    assert blocks.nodes is not None, "blocks.nodes is None: these blocks weigh every page"
    count, kv_heads, table = len(blocks), len(summaries.sigma), blocks.nodes.physical
    first, end = node_range(blocks.page, plan)
    node = torch.arange(table.shape[1], device=table.device)
    node = node.where((node >= first) & (node < end[:, None]), -1)  # [N, J]

    def of_heads(listed: Tensor) -> Tensor:
        return listed.unsqueeze(1).expand(-1, kv_heads, -1)

    every = Part(nodes, table, of_heads(node).contiguous(), NODE_PAGES)
    head, tail = map(of_heads, edge_pages(blocks.page, plan))
    edges = Part(summaries, blocks.table, torch.cat([head, tail], -1))
    total = torch.empty(count, query.shape[1], PAGE_SIZE, dtype=float32, device=table.device)
    mass(query, (every, edges), blocks, plan, scale, total)
    found = torch.empty(count, kv_heads, every.columns, dtype=float32, device=table.device)
    score(query, every, blocks, plan, scale, total, found)
    beam = best_nodes(found, first, end, min(plan.beam, every.columns))
    left = of_heads(node).masked_fill(mark(beam, beam >= 0, every.columns), -1)
    pages = torch.cat([head, node_pages(beam), tail], -1)
    return Part(nodes, table, left, NODE_PAGES), Part(summaries, blocks.table, pages)
