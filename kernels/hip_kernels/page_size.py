"""How many tokens a page has: one number for all processes of a deployment."""

from __future__ import annotations

import os

VARIABLE = "HIP_SGLANG_PAGE_SIZE"
PAGE_SIZES = (16, 32, 64)


def page_size() -> int:
    """What the environment says, or 64. Raises ValueError for a size that kernels do not have."""
    given = os.environ.get(VARIABLE, "64")
    if given not in map(str, PAGE_SIZES):
        raise ValueError(
            f"{VARIABLE}={given}: a page has 16, 32 or 64 tokens; set one of these, or leave it out"
        )
    return int(given)
