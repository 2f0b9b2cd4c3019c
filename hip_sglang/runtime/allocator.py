"""SGLang's paged KV allocator without its Triton kernels, for machines that have no accelerator."""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator, alloc_extend_naive
from torch import Tensor


class HostPagedAllocator(PagedTokenToKVPoolAllocator):  # type: ignore[misc]
    """Hands out slots page by page: a request fills its last page before it takes a new one."""

    page_size: int
    free_pages: Tensor

    def alloc_extend(
        self,
        prefix_lens: Tensor,
        prefix_lens_cpu: Tensor,
        seq_lens: Tensor,
        seq_lens_cpu: Tensor,
        last_loc: Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> Tensor | None:
        """Slots for the tokens between ``prefix_lens`` and ``seq_lens``; None when out of pages."""
        needed = int((self._pages(seq_lens_cpu) - self._pages(prefix_lens_cpu)).sum())
        if not self._make_available(needed):
            return None
        slots = torch.empty(extend_num_tokens, dtype=torch.int64, device=self.device)
        alloc_extend_naive(
            prefix_lens, seq_lens, last_loc, self.free_pages, slots, self.page_size, self.device
        )
        self.free_pages = self.free_pages[needed:]
        return slots

    def alloc_decode(
        self, seq_lens: Tensor, seq_lens_cpu: Tensor, last_loc: Tensor
    ) -> Tensor | None:
        """One slot a request, for its token at ``seq_lens - 1``; None when out of pages."""
        opens_page = (seq_lens_cpu - 1) % self.page_size == 0  # [B]
        needed = int(opens_page.sum())
        if not self._make_available(needed):
            return None
        slots = last_loc.to(torch.int64) + 1
        slots[opens_page.to(slots.device)] = self.free_pages[:needed] * self.page_size
        self.free_pages = self.free_pages[needed:]
        return slots

    def _pages(self, tokens: Tensor) -> Tensor:
        return (tokens + self.page_size - 1) // self.page_size

    def _make_available(self, pages: int) -> bool:
        if pages > len(self.free_pages):
            self.merge_and_sort_free()
        return pages <= len(self.free_pages)
