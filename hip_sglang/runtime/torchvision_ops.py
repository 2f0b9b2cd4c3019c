"""Let torchvision be imported beside a torch that its compiled library does not fit."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
from pathlib import Path

import torch

# a Library's operators vanish with it, so it lives as long as the process
_declared: list[torch.library.Library] = []


def declare_missing_operators() -> None:
    """Declare the two operators whose absence makes ``import torchvision`` raise.

    transformers imports torchvision wherever it is installed, and PyPI's wheel is compiled for
    CUDA: beside a CPU build of torch the library cannot load, its operators do not exist, and
    torchvision fails while describing them. Only their schemas are declared; calling one raises.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _declared or _library_loads(Path(spec.origin).parent):
        return
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        schema = f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        library.define(schema)  # type: ignore[no-untyped-call]
    _declared.append(library)


def _library_loads(package: Path) -> bool:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        library = package / f"_C{suffix}"
        if library.exists():
            try:
                torch.ops.load_library(os.fspath(library))  # type: ignore[no-untyped-call]
            except OSError:
                return False
            return True
    return False
