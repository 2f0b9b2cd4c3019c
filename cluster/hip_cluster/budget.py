"""How much memory a machine needs for its part of an endpoint: pure arithmetic.

The chart computes the same (``tests/cluster/memory_cases.yaml`` holds both to one table), so every
part is rounded up to whole MiB before it is added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hip_cluster.spec import EndpointSpec


@dataclass(frozen=True)
class HostMemory:
    """Host memory of one machine (or pod) of one replica, in MiB: request = limit = total."""

    ranks: int
    offload_mib: int  # KV of all ranks here together
    staging_mib: int  # of all ranks here together
    shm_mib: int
    reserve_mib: int

    @property
    def total_mib(self) -> int:
        return self.offload_mib + self.staging_mib + self.shm_mib + self.reserve_mib

    @property
    def offload_mib_per_rank(self) -> int:
        return self.offload_mib // self.ranks

    def sentence(self) -> str:
        """The sum, for people."""
        return (
            f"a machine with {self.ranks} of the ranks needs {_gib(self.total_mib)} GiB "
            f"(offloaded KV {_gib(self.offload_mib)}, weights {_gib(self.staging_mib)}, "
            f"/dev/shm {_gib(self.shm_mib)}, reserve {_gib(self.reserve_mib)})"
        )


def host_memory(spec: EndpointSpec) -> HostMemory:
    """What each machine of a replica needs; every machine has equally many ranks."""
    ranks, memory = spec.parallel.ranks_per_node, spec.memory
    return HostMemory(
        ranks=ranks,
        offload_mib=_mib(spec.offload.host_gib) if spec.offload else 0,
        staging_mib=ranks * _mib(memory.staging_gib_per_rank),
        shm_mib=_mib(memory.shm_gib),
        reserve_mib=_mib(memory.reserve_gib),
    )


def _mib(gib: float) -> int:
    return math.ceil(gib * 1024)


def _gib(mib: int) -> str:
    return f"{mib / 1024:.1f}".removesuffix(".0")
