import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
import triton
import triton.experimental.gluon  # it insists on what the fixture replaces
from triton.runtime.interpreter import InterpretedFunction, _patch_lang
from triton.runtime.jit import JITFunction


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton's interpreter takes its time."""
    for item in items:
        if "interpreted" in getattr(item, "fixturenames", ()):
            item.add_marker("interpreter")


# many small tensors: threads would only wait for one another
torch.set_num_threads(1)


@pytest.fixture
def interpreted(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[ModuleType], ModuleType]]:
    """A module whose kernels run on the CPU: what TRITON_INTERPRET=1 does, for this test alone."""

    def interpret(module: ModuleType) -> ModuleType:
        # sums and the like are kernels, too
        ours = [of for name, of in sys.modules.items() if name.startswith("hip_kernels.")]
        for place in (*ours, triton.language, triton.language.standard):
            for name, function in list(vars(place).items()):
                if isinstance(function, JITFunction):
                    monkeypatch.setattr(place, name, InterpretedFunction(function.fn))
        return module

    # a kernel that calls another leaves the language patched, and then nothing compiles
    patched = _patch_lang(triton.language.standard.sum.fn)
    yield interpret
    patched.restore()
