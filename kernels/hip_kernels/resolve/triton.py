"""Pages to the device by kernels: who is there, who goes, and the copy; nothing asks the host.

The same as ``reference.resolve``. One program a KV head decides; copies are a launch of their own,
and read host memory that is mapped.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hip_kernels.attend.triton import exact_page
from hip_kernels.checks import check
from hip_kernels.layout import PAGE_SIZE, SparsePlan
from hip_kernels.offloaded import OffloadedKV
from hip_kernels.page_cache import Counts
from hip_kernels.select.best import KEYS_A_TILE, NO_KEY, least_taken, store_taken

# entries that one program looks at together
ENTRIES = 256
# numbers of a page that one program copies together
PIECE = 2048
_NOWHERE = tl.constexpr(-1)
_CHOSEN = tl.constexpr(int(Counts.CHOSEN))
_HELD = tl.constexpr(int(Counts.HELD))
_FETCHED = tl.constexpr(int(Counts.FETCHED))
_ESTIMATED = tl.constexpr(int(Counts.ESTIMATED))
_STALLS = tl.constexpr(int(Counts.STALLS))


def bring(
    kv: OffloadedKV,
    table: Tensor,
    page: Tensor,
    chosen: Tensor | None,
    row: Tensor,
    reuses: Tensor,
    plan: SparsePlan,
    sparse_from: int,
    estimates: bool,
) -> Tensor | None:
    """Bring what query blocks attend exactly, and return what they attend of ``chosen``.

    table [N | 1, P] physical pages; page [N] that holds each block; chosen [R, Hkv, K] logical
    pages, of which a block in ``sparse_from`` or a later page attends its ``row`` [N], with sink
    and window; None, and those before it: every page. ``reuses`` [N] are not counted as found.
    With ``estimates``, chosen pages that are not here yet are brought, and not attended: they are
    -1 in what is returned.
    """
    heads, count = kv.kv_heads, len(page)
    check("page", page, (count,), torch.int64)
    check("row", row, (count,), torch.int64)
    check("reuses", reuses, (count,), torch.int32)
    check("table", table, (None, None), torch.int64)
    assert len(table) in (1, count), f"table is of {len(table)} blocks; there are {count}"
    budget, most = 0, table.shape[1]
    if chosen is not None:
        check("chosen", chosen, (None, heads, None), torch.int64)
        budget = chosen.shape[2]
        exact = plan.sink_pages + budget + plan.window_pages + 1
        most = max(exact, min(most, sparse_from))
    cache, slots = kv.cache, kv.cache.slots
    missing = page.new_empty(heads, min(slots, count * most))
    victims = torch.empty_like(missing)
    keys, taken = (
        torch.empty(heads, size, dtype=torch.int32, device=page.device)
        for size in (slots, missing.shape[1])
    )
    found = torch.empty(heads, dtype=torch.int32, device=page.device)
    attended = chosen
    if chosen is not None and estimates:
        attended = torch.empty_like(chosen)
    unread = row  # where nothing is chosen
    _resolve[(heads,)](
        *(table, page, unread if chosen is None else chosen, row, reuses),
        unread if attended is None else attended,
        *(cache.slot, cache.page, cache.used, cache.step, cache.counts),
        *(missing, victims, keys, taken, found),
        *(count * most, most, 0 if len(table) == 1 else table.shape[1], budget, sparse_from),
        *(plan.sink_pages, plan.window_pages, cache.slot.shape[1], slots, missing.shape[1]),
        CHOOSES=chosen is not None,
        ESTIMATES=estimates,
        ENTRIES=ENTRIES,
        KEYS=KEYS_A_TILE,
        num_warps=4,
        # left alone, the assembler spills to have more programs at once
        maxnreg=255,
    )
    width = kv.host.rows.shape[2]
    _swap_in[(missing.shape[1], heads)](
        *(kv.host.rows, cache.key, cache.value, missing, victims, found),
        *(missing.shape[1], slots),
        KEY=kv.host.head_dim * PAGE_SIZE,
        SPAN=width,
        PIECE=PIECE,
        num_warps=4,
    )
    return attended


def write(kv: OffloadedKV, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """Tokens at slots [T] of the pool, to host memory and to what the device holds of them.

    key [T, Hkv, D] and value [T, Hkv, Dv], as stored.
    """
    host, cache = kv.host, kv.cache
    tokens, heads = len(slots), kv.kv_heads
    check("slots", slots, (tokens,), torch.int64)
    check("key", key, (tokens, heads, host.head_dim), host.rows.dtype)
    check("value", value, (tokens, heads, host.value_dim), host.rows.dtype)
    _write[(tokens, heads)](
        *(slots, key, value, host.rows, cache.key, cache.value, cache.slot),
        *(cache.slot.shape[1], cache.slots),
        PAGE=PAGE_SIZE,
        WIDTH=host.head_dim,
        VALUE_WIDTH=host.value_dim,
        BLOCK=triton.next_power_of_2(host.head_dim),
        VALUE_BLOCK=triton.next_power_of_2(host.value_dim),
        num_warps=1,
    )


@triton.jit
def _resolve(
    table,
    own_pages,
    chosen,
    kept_rows,
    reuses,
    attended,
    slot_of,
    page_in,
    used,
    step,
    counts,
    missing,  # [Hkv, room] physical pages
    victims,  # [Hkv, room] and the slots that they get
    keys,  # [Hkv, slots] scratch: the larger, the longer a slot was not used
    taken,  # [Hkv, room] scratch
    found,  # [Hkv] how many are missing
    entries,
    most,  # entries of a block
    stride,  # between the tables of two blocks
    budget,
    sparse_from,
    sink,
    window,
    pages,  # of the pool
    slots,
    room,
    CHOOSES: tl.constexpr,
    ESTIMATES: tl.constexpr,
    ENTRIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    heads = tl.num_programs(0)
    slot_of += head * pages
    page_in += head * slots
    used += head * slots
    keys += head * slots
    missing += head * room
    victims += head * room
    taken += head * room
    now = tl.load(step + head) + 1
    tl.debug_barrier()
    tl.store(step + head, now)
    tile = tl.arange(0, ENTRIES)
    searched = tl.full((), 0, tl.int64)
    hits = tl.full((), 0, tl.int64)
    left = tl.full((), 0, tl.int64)
    for start in range(0, entries, ENTRIES):
        page, number, at, listed, fresh = _wanted(
            start + tile, entries, most, stride, table, own_pages, chosen, kept_rows, reuses,
            head, heads, budget, sparse_from, sink, window, CHOOSES,
        )  # fmt: skip
        slot = tl.load(slot_of + page, mask=page >= 0, other=-1)
        tl.store(used + slot, now, mask=slot >= 0)
        new = listed & fresh & (page >= 0)
        searched += tl.sum(new.to(tl.int64), 0)
        hits += tl.sum((new & (slot >= 0)).to(tl.int64), 0)
        if ESTIMATES:
            left += tl.sum((listed & (page >= 0) & (slot < 0)).to(tl.int64), 0)
            tl.store(attended + at, tl.where(slot >= 0, number, -1), mask=listed)
    # of entries for the same page the last one asks: it leaves the smallest number
    tl.debug_barrier()
    for start in range(0, entries, ENTRIES):
        entry = start + tile
        page, _, _, _, _ = _wanted(
            entry, entries, most, stride, table, own_pages, chosen, kept_rows, reuses,
            head, heads, budget, sparse_from, sink, window, CHOOSES,
        )  # fmt: skip
        slot = tl.load(slot_of + page, mask=page >= 0, other=0)
        tl.atomic_min(slot_of + page, -2 - entry, mask=(page >= 0) & (slot < 0))
    tl.debug_barrier()
    count = tl.full((), 0, tl.int32)
    for start in range(0, entries, ENTRIES):
        entry = start + tile
        page, _, _, _, _ = _wanted(
            entry, entries, most, stride, table, own_pages, chosen, kept_rows, reuses,
            head, heads, budget, sparse_from, sink, window, CHOOSES,
        )  # fmt: skip
        asks = (page >= 0) & (tl.load(slot_of + page, mask=page >= 0, other=0) == -2 - entry)
        number = asks.to(tl.int32)
        place = count + tl.cumsum(number, 0) - 1
        tl.store(missing + place, page, mask=asks & (place < room))
        count += tl.sum(number, 0)
    for start in range(0, slots, KEYS):
        slot = start + tl.arange(0, KEYS)
        age = now - tl.load(used + slot, mask=slot < slots, other=0)
        age = tl.minimum(age, (1 << 31) - 1).to(tl.int32)
        # what this step wants stays
        tl.store(keys + slot, tl.where(age > 0, age, NO_KEY), mask=slot < slots)
    asked = tl.minimum(count, room)
    least, equal = least_taken(keys, slots, asked, KEYS)
    store_taken(keys, slots, asked, least, equal, victims, taken, KEYS)
    for start in range(0, asked, ENTRIES):
        place = start + tile
        real = place < asked
        slot = tl.load(victims + place, mask=real, other=-1)
        gone = tl.load(page_in + slot, mask=slot >= 0, other=-1)
        tl.store(slot_of + gone, _NOWHERE, mask=gone >= 0)
    tl.debug_barrier()
    for start in range(0, asked, ENTRIES):
        place = start + tile
        real = place < asked
        slot = tl.load(victims + place, mask=real, other=-1)
        page = tl.load(missing + place, mask=real, other=0)
        # without a slot, which the sizes at start rule out, a page is nowhere
        tl.store(slot_of + page, slot.to(tl.int32), mask=real)
        tl.store(page_in + slot, page.to(tl.int32), mask=slot >= 0)
        tl.store(used + slot, now, mask=slot >= 0)
    tl.store(found + head, asked)
    tl.atomic_add(counts + _CHOSEN, searched)
    tl.atomic_add(counts + _HELD, hits)
    tl.atomic_add(counts + _ESTIMATED, left)
    tl.atomic_add(counts + _FETCHED, asked.to(tl.int64))
    tl.atomic_add(counts + _STALLS, (asked > 0).to(tl.int64))


@triton.jit
def _wanted(
    entry,
    entries,
    most,
    stride,
    table,
    own_pages,
    chosen,
    kept_rows,
    reuses,
    head,
    heads,
    budget,
    sparse_from,
    sink,
    window,
    CHOOSES: tl.constexpr,
):
    """The pages of entries, physical and logical, -1 is none.

    And where in ``chosen`` each stands, whether it stands there, and was found just now.
    """
    block = (entry // most).to(tl.int64)
    column = entry % most
    real = entry < entries
    own = tl.load(own_pages + block, mask=real, other=-1)
    number = tl.where(column <= own, column.to(tl.int64), -1)
    at = block
    listed = entry < 0
    fresh = entry < 0
    if CHOOSES:
        sparse = real & (own >= sparse_from)
        row = tl.load(kept_rows + block, mask=sparse, other=0) * heads + head
        at = row * budget + column - sink
        listed = sparse & (column >= sink) & (column < sink + budget)
        exact = exact_page(column, chosen + row * budget, own, budget, sink, window)
        exact = tl.where(column <= sink + budget + window, exact, -1)
        number = tl.where(sparse, exact, number)
        fresh = tl.load(reuses + block, mask=sparse, other=1) == 0
    number = tl.where(real, number, -1)
    page = tl.load(table + block * stride + number, mask=number >= 0, other=-1)
    return page, number, at, listed, fresh


@triton.jit
def _swap_in(
    host,
    key,
    value,
    missing,
    victims,
    found,
    room,
    slots,
    KEY: tl.constexpr,
    SPAN: tl.constexpr,
    PIECE: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0)
    if place >= tl.load(found + head):
        return
    slot = tl.load(victims + head * room + place)
    if slot < 0:
        return
    host += (tl.load(missing + head * room + place) * tl.num_programs(1) + head) * SPAN
    key += (head * slots + slot) * KEY
    value += (head * slots + slot) * (SPAN - KEY)
    for start in range(0, SPAN, PIECE):
        at = start + tl.arange(0, PIECE)
        piece = tl.load(host + at, mask=at < SPAN)
        tl.store(key + at, piece, mask=at < KEY)
        tl.store(value + at - KEY, piece, mask=(at >= KEY) & (at < SPAN))


@triton.jit
def _write(
    tokens,
    key,
    value,
    host,
    held_key,
    held_value,
    slot_of,
    pages,
    slots,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    at = tl.load(tokens + token)
    page, offset = at // PAGE, at % PAGE
    slot = tl.load(slot_of + head * pages + page).to(tl.int64)
    host += (page * heads + head) * PAGE * (WIDTH + VALUE_WIDTH)
    d = tl.arange(0, BLOCK)
    k = tl.load(key + (token * heads + head) * WIDTH + d, mask=d < WIDTH)
    tl.store(host + offset * WIDTH + d, k, mask=d < WIDTH)
    copy = ((head * slots + slot) * PAGE + offset) * WIDTH
    tl.store(held_key + copy + d, k, mask=(d < WIDTH) & (slot >= 0))
    d = tl.arange(0, VALUE_BLOCK)
    v = tl.load(value + (token * heads + head) * VALUE_WIDTH + d, mask=d < VALUE_WIDTH)
    tl.store(host + PAGE * WIDTH + offset * VALUE_WIDTH + d, v, mask=d < VALUE_WIDTH)
    copy = ((head * slots + slot) * PAGE + offset) * VALUE_WIDTH
    tl.store(held_value + copy + d, v, mask=(d < VALUE_WIDTH) & (slot >= 0))
