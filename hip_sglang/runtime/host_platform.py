"""SGLang on a machine without an accelerator: an out-of-tree CPU platform.

SGLang's own CPU engine (``SGLANG_USE_CPU_ENGINE=1``) needs a compiled ``sgl_kernel`` that PyPI
does not carry. This platform needs torch alone, on any x86 or ARM machine.
"""

from __future__ import annotations

import ctypes
import os

import torch

PLATFORM = "hip_sglang.runtime.plain_cpu.PlainCpuPlatform"
# glibc's mallopt: its parameters' names and numbers, and the most that each takes
MALLOPT = {
    "MALLOC_MMAP_THRESHOLD_": (-3, 32 << 20),
    "MALLOC_TRIM_THRESHOLD_": (-1, (2 << 30) - 1),
}


def activate() -> str | None:
    """The ``sglang.srt.platforms`` entry point: our platform's name where nothing faster exists.

    SGLang calls this while importing ``sglang.srt.utils.common``, in every process and before
    anything imports transformers or torchvision, so nothing of ``sglang`` may be imported here.
    """
    if has_accelerator() or os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    from hip_sglang.runtime.torchvision_ops import declare_missing_operators

    declare_missing_operators()
    settle_environment()
    return PLATFORM


def settle_environment() -> None:
    """What a process on a CPU needs of memory and threads; the user's own word stands.

    Torch reads two of them from the environment when it starts, here and in child processes. Huge
    pages: a page of KV is 64 rows that lie far apart in the pool, and with small memory pages
    each row is a miss of its own in the processor's page table cache. Threads that soon stop
    spinning: where another program wants the cores, a thread that spins keeps them from the one
    that it waits for, at every operation. And memory that torch frees stays with the process: a
    prefill step gives back gigabytes of scratch and wants them again, and the kernel would clear
    every page of it each time.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    libc = ctypes.CDLL(None)
    for variable, (parameter, value) in MALLOPT.items():
        # other C libraries have no such call
        if variable not in os.environ and hasattr(libc, "mallopt"):
            libc.mallopt(parameter, value)


def is_active() -> bool:
    """Whether this process runs on our platform."""
    from sglang.srt.platforms import current_platform

    return f"{type(current_platform).__module__}.{type(current_platform).__name__}" == PLATFORM


def has_accelerator() -> bool:
    """Whether torch sees a device that SGLang would choose before the CPU."""
    if torch.cuda.is_available() or torch.xpu.is_available() or torch.backends.mps.is_available():
        return True
    npu = getattr(torch, "npu", None)
    return npu is not None and bool(npu.is_available())


def processors() -> list[int]:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
