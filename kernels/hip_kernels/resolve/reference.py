"""Bring wanted pages to the device: hits, misses, victims, swap-in."""

from __future__ import annotations

import torch
from torch import Tensor

from hip_kernels.layout import PAGE_SIZE
from hip_kernels.page_cache import Counts, HostPages, PageCache


def resolve(host: HostPages, cache: PageCache, wanted: Tensor) -> None:
    """Give each wanted page [Hkv, K] of one layer a slot, and copy those there that had none.

    -1 is no page, and a page may be wanted more than once. What was not wanted for longest goes,
    never what is wanted now. Raises ``ValueError`` where a KV head wants more than it has slots.
    """
    cache.step.add_(1)
    real = wanted >= 0
    slot = cache.slot.gather(1, wanted.clamp(min=0)).long()  # [Hkv, K]
    held = real & (slot >= 0)
    heads = torch.arange(len(wanted), device=wanted.device)[:, None].expand_as(wanted)
    cache.used[heads[held], slot[held]] = cache.step[heads[held]]
    missing = real & (slot < 0)
    if not bool(missing.any()):
        return
    # each once, in the order in which a head asks for it last
    head, page = _last_of_each(heads[missing], wanted[missing])
    victim = _victims(cache, head)
    gone = cache.page[head, victim].long()
    cache.slot[head[gone >= 0], gone[gone >= 0]] = -1
    cache.page[head, victim] = page.int()
    cache.slot[head, page] = victim.int()
    cache.used[head, victim] = cache.step[head]
    cache.key[head, victim] = host.key[page, head]
    cache.value[head, victim] = host.value[page, head]
    cache.counts[Counts.FETCHED] += len(page)
    cache.counts[Counts.STALLS] += len(torch.unique(head))


def _last_of_each(head: Tensor, page: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs [C], in the order of the heads, without repetitions."""
    pairs, which = torch.unique(torch.stack([head, page]), dim=1, return_inverse=True)
    place = torch.arange(len(head), device=head.device)
    last = place.new_zeros(pairs.shape[1]).scatter_reduce_(0, which, place, "amax")
    pairs = pairs[:, last.argsort()]
    return pairs[0], pairs[1]


def _victims(cache: PageCache, head: Tensor) -> Tensor:
    """A slot for each entry of head [C], which is in order: those that were used longest ago."""
    heads, slots = cache.used.shape
    count = head.bincount(minlength=heads)
    free = (cache.used < cache.step[:, None]).sum(1)
    if bool((count > free).any()):
        worst = int((count - free).argmax())
        needed = slots + int((count - free)[worst])
        raise ValueError(
            f"{needed} pages are wanted at once of KV head {worst}, and the device has room for "
            f"{slots}; raise offload.device_tokens to {needed * PAGE_SIZE}"
        )
    rank = cache.used.argsort(dim=1, stable=True).argsort(dim=1)
    return (rank < count[:, None]).nonzero()[:, 1]
