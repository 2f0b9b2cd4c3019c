"""HiP's own selection: a binary search over the context that is guided by single real keys.

After "A Training-Free Sub-Quadratic Cost Transformer Model Serving Framework with Hierarchically
Pruned Attention" (arXiv 2406.09827), with a page as the block size. Kept as the baseline.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hip_kernels.layout import PAGE_SIZE, QueryBlocks, SparsePlan
from hip_kernels.select.weigh import NEVER, best_of_rows, lookup
from hip_kernels.stored import StoredKV


def search(query: Tensor, kv: StoredKV, blocks: QueryBlocks, plan: SparsePlan) -> Tensor:
    """The pages [Hkv, N, budget] that the search ends with, in order, -1 where there are fewer.

    query [Hkv, N, M, D] scaled. The pages between sink and window are cut into ``budget`` equal
    chunks. Each is halved; a half scores what its centre token scores with the best row of the
    block and its heads; the ``budget`` best halves of all survive; and so on until each is one
    page. O(log T) steps, each over 2 * budget keys.
    """
    heads, count = query.shape[:2]
    beam = plan.budget_pages
    between = (blocks.page - plan.window_pages - plan.sink_pages).clamp(min=0)  # [N]
    cut = torch.arange(beam + 1, device=query.device)
    edges = plan.sink_pages + cut * between[:, None] // beam  # [N, beam + 1]
    start, end = (x.expand(heads, count, beam) for x in (edges[:, :-1], edges[:, 1:]))
    for _ in range((-(-int(between.max()) // beam) - 1).bit_length()):
        middle = (start + end) // 2
        starts, ends = torch.cat([start, middle], -1), torch.cat([middle, end], -1)
        centre = (starts + ends) * PAGE_SIZE // 2
        # an empty half may lie past a short request's end
        page = (centre // PAGE_SIZE).clamp(max=blocks.table.shape[1] - 1)
        slots = lookup(blocks.table, page) * PAGE_SIZE + centre % PAGE_SIZE
        score = best_of_rows(kv.scores(query, slots, 1), blocks)  # [Hkv, N, 2 * beam]
        # half of a single page is that page, and nothing
        best = score.masked_fill_(starts == ends, NEVER).topk(beam).indices
        start, end = starts.gather(2, best), ends.gather(2, best)
    found = start.where(start < end, blocks.table.shape[1]).sort(-1).values
    return found.where(found < blocks.table.shape[1], -1)
