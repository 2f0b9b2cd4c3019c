"""Which environment variables travel from the supervisor to the ranks.

They travel with an actor's arguments and are set before anything of SGLang is imported. Ray's
``runtime_env`` would do it, too, and show them all on its dashboard.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

CARRIED = re.compile(
    r"(SGLANG|HIP_SGLANG|NCCL|GLOO|TORCH|TRITON|TRANSFORMERS|TOKENIZERS|HF|OMP|GOMP|MALLOC|THP)_\w+"
)
# what belongs to one process, or to one machine
STAYS = {
    "SGLANG_RUN_ID",
    "SGLANG_CPU_OMP_THREADS_BIND",
    "HF_HOME",
    "HF_HUB_CACHE",
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
}


def carried(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The settings of SGLang and of the libraries below it."""
    return {
        name: value
        for name, value in environment.items()
        if CARRIED.fullmatch(name) and name not in STAYS
    }


def adopt(environment: Mapping[str, str]) -> None:
    """Set them in this process; what the machine's own environment says stays."""
    for name, value in environment.items():
        os.environ.setdefault(name, value)
