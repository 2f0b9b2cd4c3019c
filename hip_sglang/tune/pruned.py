"""Attention by a ``HipConfig``, for a ``Teacher``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from hip_kernels.layout import PAGE_SIZE, Choice, QueryBlocks
from hip_kernels.ops import attend, plan_blocks
from torch import Tensor

from hip_sglang.config import LayerPlan
from hip_sglang.tune.teacher import LayerKV


class Pruned:
    """Our attention, and what its decode steps read; far contexts go without nodes."""

    def __init__(self, plans: Sequence[LayerPlan]) -> None:
        """plans: of each layer."""
        self.plans = [replace(plan, nodes_from=None) for plan in plans]
        self.shares: list[list[float]] = [[] for _ in self.plans]  # of the KV, by layer and step

    @property
    def share_read(self) -> float:
        """Of the KV, in bytes, by decode steps so far: mean over layers and steps."""
        means = [sum(shares) / max(1, len(shares)) for shares in self.shares]
        return sum(means) / len(means)

    def prompt(self, layer: int, query: Tensor, stored: LayerKV, first: int) -> Tensor:
        plan = self.plans[layer]
        return self._as_prompt(plan, query, stored, first, plan.sparse_from)

    def steps(self, layer: int, query: Tensor, stored: LayerKV, first: int) -> Tensor:
        plan, out, count = self.plans[layer], _out_of(query, stored), len(query)
        if plan.sparse_decode_from is None:
            self.shares[layer] += [1.0] * count
            return self._as_prompt(plan, query, stored, first, None)
        lengths = torch.arange(first + 1, first + count + 1)
        chooses = _choosing(plan, plan.sparse_decode_from, lengths)
        blocks = plan_blocks(
            (lengths - 1).tolist(),
            lengths.tolist(),
            stored.table.expand(count, -1),
            sparse_from=None,
            sparse_decode_from=plan.sparse_decode_from,
            reuses=~chooses,
        )
        # of each step, the last one which chose; the block of those comes first
        source = torch.arange(count).where(chooses, -1).cummax(0).values
        shares = [1.0] * count
        made: tuple[Tensor, Choice] | None = None  # who chose, in order, and what
        for block in blocks:
            held = None
            if block.reuses and made is not None:
                at = torch.searchsorted(made[0], source[block.request])
                held = Choice(made[1].entries[at], made[1].correction[at])
            found = self._attend(plan, query, stored, block, out, held)
            if found is None:
                continue
            choice, exact = found
            made = made or (block.request, choice)
            for row, step in enumerate(block.request.tolist()):
                shares[step] = plan.share_read(
                    int(block.page[row]), float(exact[row]), chooses=not block.reuses
                )
        self.shares[layer] += shares
        return out

    def _as_prompt(
        self, plan: LayerPlan, query: Tensor, stored: LayerKV, first: int, sparse_from: int | None
    ) -> Tensor:
        """As rows of a prompt."""
        out = _out_of(query, stored)
        blocks = plan_blocks(
            [first],
            [first + len(query)],
            stored.table[None],
            decodes=torch.zeros(1, dtype=torch.bool),
            sparse_from=sparse_from,
            sparse_decode_from=None,
        )
        for block in blocks:
            self._attend(plan, query, stored, block, out)
        return out

    def _attend(
        self,
        plan: LayerPlan,
        query: Tensor,
        stored: LayerKV,
        block: QueryBlocks,
        out: Tensor,
        held: Choice | None = None,
    ) -> tuple[Choice, Tensor] | None:
        """What was chosen, and how many pages each block attended exactly, mean over heads."""
        summaries = stored.summaries[plan.means]
        scale = query.shape[2] ** -0.5
        found = attend(query, stored.kv, summaries, block, plan.pages, scale, out, choice=held)
        if found is None:
            return None
        return found.choice, found.exact.double().mean(-1)


def _out_of(query: Tensor, stored: LayerKV) -> Tensor:
    return query.new_empty(*query.shape[:2], stored.kv.value.shape[2])


def _choosing(plan: LayerPlan, start: int, lengths: Tensor) -> Tensor:
    """Which steps in a row choose, as ``SelectionCache`` has it for a request that just began."""
    sparse = (lengths - 1) // PAGE_SIZE * PAGE_SIZE >= start
    follows = torch.zeros_like(sparse)
    follows[1:] = sparse[1:] & sparse[:-1]
    return ~follows | (lengths % plan.refresh == 0)
