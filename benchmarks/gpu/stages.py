"""The launchers that one call of ``fused.attend`` goes through, to be called again one by one.

What they are given is written down as it passes, so that only ``fused`` has to know it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any, Literal
from unittest.mock import patch

from hip_kernels.attend import fused

_FOLDERS = ("hip_kernels.select.", "hip_kernels.attend.")


@dataclass(frozen=True)
class Stage:
    """One launcher and what it was given."""

    kind: Literal["select", "attend"]
    name: str
    launcher: Callable[..., object]
    given: tuple[Any, ...]
    named: dict[str, Any]

    def __call__(self) -> object:
        return self.launcher(*self.given, **self.named)


def stages_of(run: Callable[[], object]) -> list[Stage]:
    """What ``run`` calls of the kernels' launchers, in order; what those call is theirs."""
    found: list[Stage] = []
    inside = False

    def spy(launcher: FunctionType) -> Callable[..., object]:
        def call(*given: Any, **named: Any) -> object:
            nonlocal inside
            if inside:
                return launcher(*given, **named)
            kind = "select" if launcher.__module__.startswith(_FOLDERS[0]) else "attend"
            found.append(Stage(kind, launcher.__name__, launcher, given, named))
            inside = True
            try:
                return launcher(*given, **named)
            finally:
                inside = False

        return call

    with ExitStack() as stack:
        for holder, name, launcher in [*_launchers()]:
            stack.enter_context(patch.object(holder, name, spy(launcher)))
        run()
    return found


def _launchers() -> Iterator[tuple[ModuleType, str, FunctionType]]:
    """The functions that ``fused`` has by name, and those of the modules that it has."""
    modules = [
        each
        for each in vars(fused).values()
        if isinstance(each, ModuleType) and each.__name__.startswith(_FOLDERS)
    ]
    for holder in (fused, *modules):
        for name, each in vars(holder).items():
            ours = isinstance(each, FunctionType) and each.__module__.startswith(_FOLDERS)
            if ours and each.__module__ != fused.__name__:
                yield holder, name, each
