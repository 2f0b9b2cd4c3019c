"""How the demo and the benchmarks size an offloaded KV cache on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hip_kernels.layout import PAGE_SIZE

from hip_sglang.config import HipConfig
from hip_sglang.kv.memory import GIB, KVShape


def token_bytes_of(model: Path) -> int:
    """What the KV of a token takes in float32, for a directory with a ``config.json``."""
    described = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return KVShape.of(described, itemsize=4).token_bytes


def sized_offload(token_bytes: int, context: int, spare: int, share: int) -> dict[str, Any]:
    """``HipConfig.offload`` with room for ``context`` and ``spare`` tokens in host memory.

    The device holds one in ``share`` tokens of the context, and no fewer than one query reads.
    """
    pages = max(HipConfig().step_pages, -(-context // share // PAGE_SIZE))
    return {
        # page 0 is SGLang's padding
        "host_gib": (context + spare + PAGE_SIZE) * token_bytes / GIB,
        "device_tokens": pages * PAGE_SIZE,
    }
