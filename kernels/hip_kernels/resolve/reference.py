"""Bring wanted pages to the device: hits, misses, victims, swap-in."""

from __future__ import annotations

import torch
from torch import Tensor

from hip_kernels.offloaded import Counts, HostPages, PageCache


def resolve(host: HostPages, cache: PageCache, wanted: Tensor) -> None:
    """Give each wanted page [Hkv, K] of one layer a slot, and copy those there that had none.

    -1 is no page, and a page may be wanted more than once. What was not wanted for longest goes,
    never what is wanted now. Raises ``ValueError`` where a KV head wants more than it has slots.
    """
    cache.step.add_(1)
    real = wanted >= 0
    slot = cache.slot.gather(1, wanted.clamp(min=0)).long()  # [Hkv, K]
    held = real & (slot >= 0)
    head = torch.arange(len(wanted), device=wanted.device)[:, None].expand_as(wanted)
    cache.used[head[held], slot[held]] = cache.step
    missing = real & (slot < 0)
    if not bool(missing.any()):
        return
    pages = cache.slot.shape[1]
    # each once, head by head
    head, page = _divmod(torch.unique((head * pages + wanted)[missing]), pages)
    victim = _victims(cache, head)
    gone = cache.page[head, victim].long()
    cache.slot[head[gone >= 0], gone[gone >= 0]] = -1
    cache.page[head, victim] = page.int()
    cache.slot[head, page] = victim.int()
    cache.used[head, victim] = cache.step
    cache.key[head, victim] = host.key[page, head]
    cache.value[head, victim] = host.value[page, head]
    cache.counts[Counts.FETCHED] += len(page)
    cache.counts[Counts.STALLS] += 1


def _victims(cache: PageCache, head: Tensor) -> Tensor:
    """A slot for each entry of head [C], which is in order: those that were used longest ago."""
    heads, slots = cache.used.shape
    count = head.bincount(minlength=heads)
    free = (cache.used < cache.step).sum(1)
    if bool((count > free).any()):
        worst = int((count - free).argmax())
        needed = slots + int((count - free)[worst])
        raise ValueError(
            f"{needed} pages are wanted at once of KV head {worst}, and the device has room for "
            f"{slots}; raise offload.device_tokens to {needed * cache.key.shape[2]}"
        )
    place = torch.arange(len(head), device=head.device) - (count.cumsum(0) - count)[head]
    oldest = cache.used.argsort(dim=1, stable=True)
    return oldest[head, place]


def _divmod(number: Tensor, by: int) -> tuple[Tensor, Tensor]:
    return number // by, number % by
