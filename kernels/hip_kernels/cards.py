"""Compile kernels for cards that this machine does not have.

Triton compiles for whatever its driver names, and asks the driver to load and launch the result.
Ours names a card, and reads from the binary what it would take there: the launchers that we ship
run as they are, on tensors of the ``meta`` device.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

_TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# a device number of its own for each context, so that nothing comes from the caches of another
_numbers = count(1000)


@dataclass(frozen=True)
class Card:
    """A generation of GPUs: its compute capability, and shared memory for one block."""

    name: str
    capability: int
    shared_bytes: int


CARDS = (
    Card("sm_80", 80, 163 << 10),
    Card("sm_90", 90, 227 << 10),
    Card("sm_100", 100, 227 << 10),
)


@dataclass(frozen=True)
class Binary:
    """What one compiled kernel takes of a card: a thread's registers, a block's shared memory."""

    kernel: str
    registers: int
    spilled_bytes: int
    shared_bytes: int

    @classmethod
    def read(cls, kernel: str, cubin: bytes, shared_bytes: int) -> Binary:
        """Raises CalledProcessError where the CUDA tool that comes with Triton cannot read it."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            command = [str(_TOOL), "-res-usage", file.name]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", said)}
        return cls(kernel, found["REG"], found["STACK"] + found["LOCAL"], shared_bytes)


@dataclass
class Compiled:
    """What was compiled, in order, and how many launches asked for it."""

    binaries: list[Binary] = field(default_factory=list)
    launches: int = 0


@contextmanager
def compiling_for(card: Card) -> Iterator[Compiled]:
    """Launches inside compile for ``card`` and launch nothing; yields what was compiled.

    Triton raises OutOfResources for a kernel that wants more shared memory than a block gets.
    """
    driver = _Driver(card)
    config = triton.runtime.driver
    before = config._active
    config.set_active(driver)
    try:
        yield driver.utils.compiled
    finally:
        config._active = before


class _Utils:
    """What Triton's compiler asks a driver about a device."""

    def __init__(self, card: Card) -> None:
        self._card = card
        self.compiled = Compiled()

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self._card.shared_bytes}

    def load_binary(
        self, name: str, cubin: bytes, shared: int, device: int
    ) -> tuple[object, int, int, int, int]:
        binary = Binary.read(name, cubin, shared)
        self.compiled.binaries.append(binary)
        # module, function, registers, spills, threads of a block
        return object(), 0, binary.registers, binary.spilled_bytes, 1024


class _Driver:
    """A driver of Triton's for a card that is not there."""

    def __init__(self, card: Card) -> None:
        self._card = card
        self._number = next(_numbers)
        self.utils = _Utils(card)

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        def launch(*args: object, **kwargs: object) -> None:
            self.utils.compiled.launches += 1

        return launch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._card.capability, 32)

    def get_current_device(self) -> int:
        return self._number

    def get_current_stream(self, device: int) -> int:
        return 0
