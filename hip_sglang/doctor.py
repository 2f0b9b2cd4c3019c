"""What this machine can run, and what is missing: one finding a row, each with its remedy."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Literal

SUPPORTED_SGLANG = "0.5.21"
SUPPORTED_TORCH = "2.13.0"
GIB = 2**30
PLUGINS = {
    "sglang.srt.plugins": "hip_attention",
    "sglang.srt.platforms": "hip_attention_cpu",
}

# "missing": the server cannot run; "warn": it may, but not as well; "optional": for clusters only
State = Literal["ok", "optional", "warn", "missing"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, in plain words."""

    what: str
    state: State
    found: str
    hint: str = ""


def examine() -> list[Finding]:
    """Look at everything; a check that fails itself is reported as missing."""
    return [_guarded(check) for check in CHECKS]


def can_serve(findings: list[Finding]) -> bool:
    """Whether the server can run here."""
    return all(finding.state != "missing" for finding in findings)


def _guarded(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    # a broken installation raises anything, and is what the doctor is for
    except Exception as error:
        what = check.__name__.removeprefix("check_").replace("_", " ")
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return Finding(what, "missing", reason, "make clean setup")


def check_python() -> Finding:
    found = platform.python_version()
    if (3, 11) <= sys.version_info[:2] <= (3, 12):
        return Finding("Python", "ok", found)
    return Finding("Python", "missing", found, "use 3.11 or 3.12: make setup PYTHON=python3.12")


def check_system() -> Finding:
    found = f"{platform.system()} {platform.machine()}"
    if found == "Linux x86_64":
        return Finding("system", "ok", found)
    return Finding("system", "warn", found, "only Linux x86_64 is tested; use it, or a container")


def check_torch() -> Finding:
    found = _version("torch")
    if found is None:
        return Finding("torch", "missing", "not installed", "make setup")
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    if found.split("+")[0] == SUPPORTED_TORCH:
        return Finding("torch", "ok", f"{found}, {build}")
    hint = f"SGLang {SUPPORTED_SGLANG} pins torch {SUPPORTED_TORCH}: make setup"
    return Finding("torch", "warn", f"{found}, {build}", hint)


def check_sglang() -> Finding:
    found = _version("sglang")
    if found is not None and found.split("+")[0] == SUPPORTED_SGLANG:
        return Finding("SGLang", "ok", found)
    hint = f"exactly {SUPPORTED_SGLANG} is supported: make setup"
    return Finding("SGLang", "missing", found or "not installed", hint)


def check_plugin() -> Finding:
    """SGLang finds us by entry points, and leaves out what two of its variables leave out."""
    for group, name in PLUGINS.items():
        found = [entry for entry in entry_points(group=group) if entry.name == name]
        if not found:
            missing = f"entry point {name} of {group} is not installed"
            return Finding("plugin", "missing", missing, "pip install -e . (or make setup)")
        found[0].load()
    allowed = os.environ.get("SGLANG_PLUGINS")
    if allowed and not set(PLUGINS.values()) <= {name.strip() for name in allowed.split(",")}:
        hint = f"unset SGLANG_PLUGINS, or add {','.join(PLUGINS.values())}"
        return Finding("plugin", "missing", f"SGLANG_PLUGINS={allowed} leaves it out", hint)
    if os.environ.get("SGLANG_PLATFORM"):
        selected = f"SGLANG_PLATFORM={os.environ['SGLANG_PLATFORM']} may leave it out"
        return Finding("plugin", "warn", selected, "unset SGLANG_PLATFORM")
    return Finding(
        "plugin", "ok", f"{', '.join(PLUGINS.values())} (hip-sglang {_version('hip-sglang')})"
    )


def check_triton() -> Finding:
    found = _version("triton")
    if found is not None and importlib.util.find_spec("triton") is not None:
        return Finding("triton", "ok", found)
    hint = "SGLang imports it even on a CPU: make setup, or pip install triton"
    return Finding("triton", "missing", "not installed", hint)


def check_torchvision() -> Finding:
    """transformers imports torchvision where it is installed, so a broken one breaks the server."""
    found = _version("torchvision")
    if found is None:
        return Finding("torchvision", "ok", "not installed, and not needed")
    from hip_sglang.runtime import host_platform

    # what SGLang runs before it imports transformers, on a machine without a GPU
    host_platform.activate()
    import torch
    import torchvision  # noqa: F401  whether it can be imported is the question

    if torch._C._dispatch_has_kernel_for_dispatch_key("torchvision::nms", "CPU"):
        return Finding("torchvision", "ok", f"{found}, its compiled library loads")
    return Finding("torchvision", "ok", f"{found}, operators declared by hip-sglang")


def check_gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        found = ", ".join(f"{gpu.name} {gpu.total_memory / GIB:.0f} GiB" for gpu in properties)
        return Finding("GPU", "ok", found)
    if _driver_sees_a_gpu():
        hint = "torch cannot use it: make clean setup, with a driver for CUDA 13"
        return Finding("GPU", "warn", "one is there, but torch does not see it", hint)
    return Finding("GPU", "ok", "none: the server runs on the CPU")


def check_memory() -> Finding:
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = cgroup_memory_limit()
    found = f"{installed / GIB:.1f} GiB"
    if limit is not None and limit < installed:
        found += f", limited to {limit / GIB:.1f} GiB by the cgroup"
    usable = min(installed, limit or installed)
    if usable >= 8 * GIB:
        return Finding("memory", "ok", found)
    return Finding("memory", "warn", found, "the server wants 8 GiB; raise the container's limit")


def check_cores() -> Finding:
    cores = len(os.sched_getaffinity(0))
    if cores >= 2:
        return Finding("cores", "ok", str(cores))
    return Finding("cores", "warn", str(cores), "two or more keep the scheduler responsive")


def check_shared_memory() -> Finding:
    size = shutil.disk_usage("/dev/shm").total
    # a container's default is 64 MiB, which several ranks outgrow
    if size >= GIB:
        return Finding("shared memory", "ok", f"{size / GIB:.1f} GiB")
    hint = "docker run --shm-size=1g; in Kubernetes an emptyDir with medium: Memory"
    return Finding("shared memory", "warn", f"{size / 2**20:.0f} MiB", hint)


def check_ray() -> Finding:
    found = _version("ray")
    if found is not None:
        return Finding("ray", "ok", found)
    return Finding(
        "ray", "optional", "not installed", "for clusters: pip install 'hip-sglang[ray]'"
    )


def check_helm() -> Finding:
    found = shutil.which("helm")
    if found is not None:
        return Finding("helm", "ok", found)
    return Finding("helm", "optional", "not installed", "for Kubernetes: install Helm 3")


CHECKS: tuple[Callable[[], Finding], ...] = (
    check_python,
    check_system,
    check_torch,
    check_sglang,
    check_plugin,
    check_triton,
    check_torchvision,
    check_gpu,
    check_memory,
    check_cores,
    check_shared_memory,
    check_ray,
    check_helm,
)


def cgroup_memory_limit(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The tightest limit above this process, or None; a container sees its own at the root."""
    limits = []
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        for folder in (root, *_own_cgroups(root)):
            try:
                text = (folder / name).read_text().strip()
            except OSError:
                continue
            if text.isdecimal():
                limits.append(int(text))
    return min(limits, default=None)


def _own_cgroups(root: Path) -> list[Path]:
    """This process's cgroup (version 2) and its parents, below ``root``."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    paths = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    return [folder for path in paths if path for folder in (root / path, *(root / path).parents)]


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _driver_sees_a_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listing.stdout.startswith("GPU")


def print_table(findings: list[Finding]) -> bool:
    """A table for people; returns whether the server can run."""
    from rich.console import Console
    from rich.table import Table

    colours = {"ok": "green", "optional": "cyan", "warn": "yellow", "missing": "red"}
    table = Table("", "state", "found", "how to mend it")
    for finding in findings:
        state = f"[{colours[finding.state]}]{finding.state}[/]"
        table.add_row(finding.what, state, _plain(finding.found), _plain(finding.hint))
    console = Console()
    console.print(table)
    serves = can_serve(findings)
    console.print(
        "The server can run here." if serves else "The server cannot run here: see the red rows."
    )
    return serves


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def print_json(findings: list[Finding]) -> bool:
    """One JSON object for programs; returns whether the server can run."""
    serves = can_serve(findings)
    print(json.dumps({"can_serve": serves, "findings": [asdict(f) for f in findings]}))
    return serves
