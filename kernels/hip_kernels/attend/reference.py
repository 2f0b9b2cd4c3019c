"""Attention over the selected pages, with every pruned page as one key of its own.

One softmax over both: nothing of the context is dropped (docs/algorithm.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import repeat

import torch
from torch import Tensor

from hip_kernels.layout import (
    NODE_PAGES,
    PAGE_SIZE,
    Choice,
    QueryBlocks,
    Selection,
    SparsePlan,
    Summaries,
    soft_cap,
)
from hip_kernels.select.reference import select
from hip_kernels.select.tree import search
from hip_kernels.select.weigh import NEVER, Context, lookup, weigh_nodes, weigh_pages
from hip_kernels.stored import StoredKV

# logits that a wave of query blocks may hold in scratch, over the rows of one KV head
WAVE_LOGITS = 1 << 22


def attend(
    query: Tensor,
    kv: StoredKV,
    summaries: Summaries,
    blocks: QueryBlocks,
    plan: SparsePlan,
    scale: float,
    out: Tensor,
    nodes: Summaries | None = None,
    choice: Choice | None = None,
) -> Selection | None:
    """Attend the query blocks and write their rows of ``out`` (see ``ops.attend``)."""
    if blocks.local is None:
        attend_all(query, kv, blocks, scale, plan.logit_cap, out)
        return None
    weigher = Weigher(summaries, nodes, blocks, plan)
    plan = plan.of_rows(blocks.tokens.shape[1])
    plan = replace(plan, budget_pages=min(plan.budget_pages, blocks.table.shape[1]))
    rows = blocks.tokens.shape[1] * query.shape[1] // kv.kv_heads
    columns = plan.exact_pages * PAGE_SIZE + 8 * weigher.columns
    size = 1
    if blocks.tokens.shape[1] == 1:
        size = at_once(rows * columns, kv, plan.exact_pages)
    choices: Iterable[Choice | None] = repeat(None) if choice is None else choice.split(size)
    found = []
    for wave, held in zip(blocks.split(size), choices, strict=False):
        q = rows_of(query, wave, kv.kv_heads) * scale  # [Hkv, N, M, D]
        result, selection = attend_sparse(q, kv, weigher, wave, plan, held)
        scatter_rows(result, wave, out)
        found.append(selection)
    return together(found)


def at_once(logits: int, kv: StoredKV, pages: int) -> int:
    """How many blocks of so many logits and pages make a wave."""
    return max(1, min(WAVE_LOGITS // logits, kv.steps_at_once(pages)))


def together(waves: Sequence[Selection]) -> Selection:
    """The selections of all waves."""
    return Selection(
        Choice(
            torch.cat([wave.choice.entries for wave in waves]),
            torch.cat([wave.choice.correction for wave in waves]),
        ),
        torch.cat([wave.estimated for wave in waves]),
        torch.cat([wave.page for wave in waves]),
        waves[0].plan,
        torch.cat([wave.held for wave in waves if wave.held is not None]),
    )


class Weigher:
    """The summaries that the waves of some query blocks share."""

    def __init__(
        self,
        summaries: Summaries,
        nodes: Summaries | None,
        blocks: QueryBlocks,
        plan: SparsePlan,
    ) -> None:
        assert blocks.local is not None
        self.summaries = summaries
        self.plan = plan
        self.columns = 0
        if not plan.reads_summaries:
            return
        if nodes is not None and blocks.nodes is not None:
            self.near = nodes.take(blocks.nodes.pages)
            self.columns = NODE_PAGES * plan.beam
        else:
            self.near = summaries.take(blocks.local.pages)
        self.columns += self.near.pages

    def weigh(self, query: Tensor, blocks: QueryBlocks, chosen: Tensor | None) -> Context:
        """query [Hkv, N, M, D], scaled; chosen [Hkv, N, K] logical pages, if they are known."""
        if blocks.nodes is not None:
            return weigh_nodes(
                query, self.summaries, self.near, blocks.nodes, blocks, self.plan, chosen
            )
        assert blocks.local is not None
        return weigh_pages(query, self.near, blocks.local, blocks, self.plan)


def attend_sparse(
    query: Tensor,
    kv: StoredKV,
    weigher: Weigher,
    blocks: QueryBlocks,
    plan: SparsePlan,
    held: Choice | None,
) -> tuple[Tensor, Selection]:
    """Sink, chosen and window exactly, every other page, or its rest, through its summary.

    query [Hkv, N, M, D], scaled -> [Hkv, N, M, Dv].
    """
    chosen = None if held is None else held.entries.transpose(0, 1)
    context = weigher.weigh(query, blocks, chosen) if plan.reads_summaries else None
    correction = query.new_zeros(*query.shape[:3], 1)
    if held is not None:
        assert plan.parts == 1, "only a choice of whole pages is used again"
        correction = held.correction.transpose(0, 1).unsqueeze(-1)
    elif plan.strategy == "tree":
        chosen = search(query, kv, blocks, plan)
    else:
        assert context is not None
        chosen, correction, context = select(query, context, kv, blocks, plan)
    assert chosen is not None
    choice = Choice(chosen.transpose(0, 1), correction.squeeze(-1).transpose(0, 1))
    parts, tokens = plan.parts, PAGE_SIZE // plan.parts
    found = lookup(blocks.table, chosen // parts)
    here = kv.held(found)
    # only decode steps have a deadline
    waits = blocks.tokens.shape[1] > 1
    chosen = kv.offer(chosen, found, fresh=held is None, waits=waits)
    entries = plan.with_fixed_pages(chosen.transpose(0, 1), blocks.page, parts)
    entries = entries.transpose(0, 1)  # [Hkv, N, K]
    attended = entries[..., (entries >= 0).flatten(0, 1).any(0)]
    physical = lookup(blocks.table, attended // parts)
    kv.bring(physical, attended >= 0)
    slots = physical * PAGE_SIZE + attended % parts * tokens
    pruned: list[tuple[Tensor, Tensor]] = []
    if context is not None and plan.remainder != "none":
        # chosen parts of pages are not in what these weigh any more
        whole = chosen if parts == 1 else chosen[..., :0]
        columns = context.columns(whole, blocks.table.shape[1])
        pruned = context.remainder(columns, blocks.page, plan)
    # one softmax: a pruned page is a key like any other
    widths = [slots.shape[-1] * tokens, *(logit.shape[-1] for logit, _ in pruned)]
    logits = query.new_empty(*query.shape[:3], sum(widths))
    exact, *others = torch.split(logits, widths, -1)
    soft_cap(kv.scores(query, slots, tokens, exact), plan.logit_cap)
    absent = (attended < 0).repeat_interleave(tokens, -1)  # [Hkv, N, K * tokens]
    if bool(absent.any()):
        exact.masked_fill_(absent.unsqueeze(2), NEVER)
    hide_future(exact, future_keys(blocks, blocks.page[:, None], query.shape[2]))
    for (logit, _), other in zip(pruned, others, strict=True):
        torch.add(logit, correction, out=other)
    # in place: to have as much memory cleared once more would take longer than the softmax
    torch.softmax(logits, -1, out=logits)
    exact, *others = torch.split(logits, widths, -1)
    result = kv.mix(exact, slots, tokens)
    estimated = torch.zeros_like(correction).squeeze(-1)
    for (_, value), other in zip(pruned, others, strict=True):
        result += other @ value
        estimated += other.sum(-1)
    return result, Selection(
        choice, estimated.transpose(0, 1), blocks.page, plan, here.transpose(0, 1)
    )


def attend_all(
    query: Tensor, kv: StoredKV, blocks: QueryBlocks, scale: float, cap: float, out: Tensor
) -> None:
    """Every page exactly: the dense attention that sparse is compared with."""
    shared = blocks.table.shape[0] == 1
    near = kv.together(blocks.table[0]) if shared else None
    rows = blocks.tokens.shape[1] * query.shape[1] // kv.kv_heads
    columns = blocks.table.shape[1] * PAGE_SIZE
    size = at_once(rows * columns, kv, 1 if shared else blocks.table.shape[1])
    for wave in blocks.split(size):
        q = rows_of(query, wave, kv.kv_heads) * scale  # [Hkv, N, M, D]
        first, last = int(wave.page.min()), int(wave.page.max())
        tail = torch.arange(first, last + 1, device=query.device)
        future = future_keys(wave, tail.expand(len(wave), -1), q.shape[2])  # [N, M, tail * 64]
        if near is not None:
            key, value = (x[: (last + 1) * PAGE_SIZE].float() for x in (near.key, near.value))
            # all blocks of the wave are rows of one product: [Hkv, N * M, T]
            logits = soft_cap((q * kv.key_scale).flatten(1, 2) @ key.permute(1, 2, 0), cap)
            hide_future(logits, future.flatten(0, 1))
            result = (logits.softmax(-1) @ value.transpose(0, 1)).view(*q.shape[:3], -1)
            result *= kv.value_scale
        else:
            physical = wave.table.expand(kv.kv_heads, -1, -1)
            kv.bring(physical, physical >= 0)
            slots = physical * PAGE_SIZE
            logits = soft_cap(kv.scores(q, slots, PAGE_SIZE), cap)
            hide_future(logits, future)
            result = kv.mix(logits.softmax(-1), slots, PAGE_SIZE)
        scatter_rows(result, wave, out)


def hide_future(logits: Tensor, future: Tensor) -> None:
    """logits [..., M, T]: future [..., M, F] hides some of the last F keys."""
    logits[..., -future.shape[-1] :].masked_fill_(future, NEVER)


def rows_of(query: Tensor, blocks: QueryBlocks, kv_heads: int) -> Tensor:
    """query [T, Hq, D] -> the blocks' rows [Hkv, N, R * G, D] in float32, the group innermost."""
    count, rows = blocks.tokens.shape
    found = query.index_select(0, blocks.tokens.flatten()).float()
    found = found.view(count, rows, kv_heads, -1, query.shape[-1])  # [N, R, Hkv, G, D]
    return found.permute(2, 0, 1, 3, 4).reshape(kv_heads, count, -1, query.shape[-1])


def scatter_rows(result: Tensor, blocks: QueryBlocks, out: Tensor) -> None:
    """result [Hkv, N, R * G, Dv] -> the blocks' rows of out [T, Hq, Dv]; padding is left out."""
    heads, count, _, width = result.shape
    rows = blocks.tokens.shape[1]
    found = result.view(heads, count, rows, -1, width).permute(1, 2, 0, 3, 4).flatten(2, 3)
    real = blocks.position >= 0
    out[blocks.tokens[real]] = found[real].to(out.dtype)


def future_keys(blocks: QueryBlocks, pages: Tensor, rows: int) -> Tensor:
    """[N, rows, K * 64]: the keys of logical pages [N, K] that a row must not see; rows = R * G."""
    offset = torch.arange(PAGE_SIZE, device=pages.device)
    key = (pages.unsqueeze(-1) * PAGE_SIZE + offset).flatten(1)
    # a padding row sees its block's first key, so that its softmax is finite; it is thrown away
    row = blocks.position.where(blocks.position >= 0, blocks.page[:, None] * PAGE_SIZE)
    return key[:, None] > row.repeat_interleave(rows // row.shape[1], 1).unsqueeze(-1)
