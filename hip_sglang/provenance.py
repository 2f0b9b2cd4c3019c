"""What machine and which versions a number belongs to."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hip_sglang.runtime.host_platform import processors


def versions(*packages: str) -> dict[str, str]:
    """Of Python and of the packages; empty where one is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in packages}


def processor() -> str:
    """The CPU's name, as its maker calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def accelerator() -> str | None:
    """The first GPU's name."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def cores() -> int:
    """How many processors this process may use."""
    return len(processors())


def memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def git_sha(clone: Path) -> str:
    """The commit of a clone, with a + where more than results has changed since."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=clone, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
