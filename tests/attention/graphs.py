"""What a CUDA graph does, on a CPU: operators and launches recorded once, run again as they were.

A replay runs no Python but what was recorded, on the very tensors that were there, which is what
makes a plan that holds a number of the host's wrong. And as under a capture, whatever asks a tensor
for a number is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

# they wait for the device, or make a shape of what they find there
WAIT = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::index.Tensor_mask",
    "aten::nonzero",
    "aten::_unique2",
    "aten::masked_select",
    "aten::repeat_interleave.Tensor",
}


class Graph(TorchDispatchMode):
    """Record inside ``with``; then ``replay``."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self._patch = patch
        self._steps: list[Callable[[], None]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        name = func._schema.name
        masks = name.startswith("aten::index") and any(
            isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool
            for leaf in tree_leaves(args[1] if len(args) > 1 else None)
        )
        number = name.startswith("aten::index_put") and args[2].dim() == 0
        assert not number, f"{func} of a number brings it to the device first"
        assert not masks, f"{func} with a mask asks how much of it is true"
        assert name not in WAIT, f"{func} waits for the device"
        made = func(*args, **kwargs)

        def again() -> None:
            for old, new in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
                # a view leads to the same memory anyway
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        self._steps.append(again)
        return made

    def replay(self) -> None:
        for step in self._steps:
            step()

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Kernels on the interpreter are launches of the graph."""
        run = InterpretedFunction.run

        def record(function: Any, *args: Any, **kwargs: Any) -> None:
            def launch() -> None:
                with _disable_current_modes():
                    run(function, *args, **kwargs)

            launch()
            self._steps.append(launch)

        with self._patch.context() as inner, self:
            inner.setattr(InterpretedFunction, "run", record)
            yield


class CudaGraph:
    """The real thing, with the same methods."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    @contextmanager
    def capture(self) -> Iterator[None]:
        with torch.cuda.graph(self._graph):
            yield

    def replay(self) -> None:
        self._graph.replay()
