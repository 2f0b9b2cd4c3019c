"""Finds the files of ``benchmarks/``, in a clone and in an installed wheel alike."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

PACKAGE = "hip_sglang._benchmarks"


def folder() -> Path:
    """Where the benchmarks are: inside the installed package, or beside it in a clone."""
    package = Path(__file__).parent
    installed = package / "_benchmarks"
    return installed if installed.is_dir() else package.parent / "benchmarks"


def bench_names() -> list[str]:
    """The benchmarks that can be run: the files that define ``main(argv) -> int``."""
    return sorted(
        path.stem
        for path in folder().glob("*.py")
        if "\ndef main(argv" in path.read_text(encoding="utf-8")
    )


def load_bench(name: str) -> ModuleType:
    """Import one of them. They import each other relatively, so the package's name is ours."""
    if PACKAGE not in sys.modules:
        spec = ModuleSpec(PACKAGE, None, is_package=True)
        spec.submodule_search_locations = [str(folder())]
        sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{PACKAGE}.{name}")
