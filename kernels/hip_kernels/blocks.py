"""Which query blocks a batch has: the plan of one forward pass, shared by all of its layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hip_kernels.layout import NODE_PAGES, PAGE_SIZE, LocalPages, QueryBlocks

_NEVER = 1 << 62


def plan_blocks(
    prefix_lens: Sequence[int],
    seq_lens: Sequence[int],
    page_table: Tensor,
    *,
    decodes: Tensor | None = None,
    sparse_from: int | None,
    sparse_decode_from: int | None,
    nodes_from: int | None = None,
    node_table: Tensor | None = None,
    reuses: Tensor | None = None,
) -> list[QueryBlocks]:
    """Cut a batch of extends into query blocks that can be computed together.

    Request b brings the tokens ``prefix_lens[b] .. seq_lens[b] - 1``, back to back in the flat
    batch; page_table [B, P] leads from its logical pages to physical ones. ``decodes`` [B] marks
    the decode steps; without it they are the requests that bring one token. Blocks at positions
    from ``sparse_from`` on (``sparse_decode_from`` for decode steps) prune; None never does. Only a
    block's own position decides, never the batch.

    The last row of an incomplete page predicts the first new token. Where it prunes it is a block
    of its own, as the decode steps after it: it need not share a budget with up to 62 others.

    Blocks that prune and stand at ``nodes_from`` or later search through nodes:
    node_table [B, J] leads from a request's n-th node of ``NODE_PAGES`` pages to where it is.
    Decode steps of requests that ``reuses`` [B] marks are blocks by themselves.
    """
    prefix = torch.tensor(prefix_lens, dtype=torch.int64)
    length = torch.tensor(seq_lens, dtype=torch.int64)
    start = (length - prefix).cumsum(0) - (length - prefix)  # [B] first row in the flat batch
    page = (length - 1) // PAGE_SIZE
    decode = length - prefix == 1 if decodes is None else decodes
    again = torch.zeros_like(decode) if reuses is None else reuses
    tail = ~decode & (length % PAGE_SIZE != 0) & (length > prefix)
    tail &= page * PAGE_SIZE >= (_NEVER if sparse_from is None else sparse_from)
    end = length - tail.long()  # of the rows that share blocks
    first, last = prefix // PAGE_SIZE, (end - 1) // PAGE_SIZE

    def of(
        chosen: Tensor, ends: Tensor, rows: int, threshold: int | None, reuses: bool = False
    ) -> list[QueryBlocks]:
        """One block a request; sorted by length, so that waves pad their tables little."""
        requests = chosen.nonzero().flatten()
        requests = requests[ends[requests].argsort(stable=True)]
        return _split_by(
            threshold,
            page=(ends[requests] - 1) // PAGE_SIZE,
            prefix=prefix[requests],
            length=ends[requests],
            start=start[requests],
            table=page_table[requests],
            rows=rows,
            nodes_from=nodes_from,
            node_table=None if node_table is None else node_table[requests],
            request=requests,
            reuses=reuses,
        )

    found = of(decode & ~again, length, 1, sparse_decode_from)
    found += of(decode & again, length, 1, sparse_decode_from, reuses=True)
    found += of(tail, length, 1, sparse_from)
    found += of((first == last) & ~decode & (end > prefix), end, PAGE_SIZE, sparse_from)
    for b in ((last > first) & ~decode).nonzero().flatten().tolist():
        found += _split_by(
            sparse_from,
            page=torch.arange(int(first[b]), int(last[b]) + 1),
            prefix=prefix[b : b + 1],
            length=end[b : b + 1],
            start=start[b : b + 1],
            table=page_table[b : b + 1],
            rows=PAGE_SIZE,
            nodes_from=nodes_from,
            node_table=None if node_table is None else node_table[b : b + 1],
            request=torch.tensor([b]),
        )
    return found


def _split_by(
    threshold: int | None,
    *,
    page: Tensor,  # [N]
    prefix: Tensor,  # [N | 1]
    length: Tensor,  # [N | 1]
    start: Tensor,  # [N | 1]
    table: Tensor,  # [N | 1, P]
    rows: int,
    request: Tensor,  # [N | 1]
    reuses: bool = False,
    nodes_from: int | None = None,
    node_table: Tensor | None = None,  # [N, J]
) -> list[QueryBlocks]:
    """Blocks below the threshold, which keep every page, those that prune, those with nodes."""
    base = page * PAGE_SIZE if rows == PAGE_SIZE else length - 1
    position = base[:, None] + torch.arange(rows)  # [N, R]
    real = (position >= prefix[:, None]) & (position < length[:, None])
    tokens = (start[:, None] + position - prefix[:, None]).where(real, start[:, None])
    position = position.where(real, -1)
    at = page * PAGE_SIZE
    sparse = at >= (_NEVER if threshold is None else threshold)
    far = sparse & (at >= (_NEVER if nodes_from is None else nodes_from))
    device = table.device
    found = []
    for members in (~sparse, sparse & ~far, far):
        if not bool(members.any()):
            continue
        some = page[members]
        near = _rows(table, members, some + 1)
        nodes = None
        if bool(far[members].all()):
            assert node_table is not None
            nodes = LocalPages(_rows(node_table, members, some // NODE_PAGES))
        found.append(
            QueryBlocks(
                tokens=tokens[members].to(device),
                position=position[members].to(device),
                page=some.to(device),
                table=near,
                local=LocalPages(near) if bool(sparse[members].all()) else None,
                request=(request if len(request) == 1 else request[members]).to(device),
                nodes=nodes,
                reuses=reuses,
            )
        )
    return found


def _rows(table: Tensor, members: Tensor, count: Tensor) -> Tensor:
    """Of table [N | 1, P] the rows of the members, each ``count`` [N] entries long."""
    longest = int(count.max())
    near = (table if len(table) == 1 else table[members])[:, :longest].long()
    # beyond its end a request's row holds whatever was there: any page of its own will do
    own = torch.arange(longest) < (count[:, None] if len(near) > 1 else longest)
    return near.where(own.to(near.device), near[:, :1])
