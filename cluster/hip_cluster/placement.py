"""Where the ranks of a replica go: bundles of a Ray placement group, one a machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from hip_cluster.spec import EndpointSpec

Strategy = Literal["STRICT_PACK", "STRICT_SPREAD"]


@dataclass(frozen=True)
class Placement:
    """What one replica asks of Ray; bundle 0 also holds the HTTP server."""

    bundles: tuple[dict[str, float], ...]
    strategy: Strategy

    def sentence(self) -> str:
        """What is asked for, for people."""
        bundle = ", ".join(f"{amount:g} {name}" for name, amount in self.bundles[0].items())
        if len(self.bundles) == 1:
            return f"one machine with {bundle} free"
        return f"{len(self.bundles)} machines with {bundle} free on each"


def placement(spec: EndpointSpec) -> Placement:
    """One bundle a machine; several are never on one machine."""
    parallel = spec.parallel
    bundle = {"CPU": float(parallel.ranks_per_node * parallel.cpus_per_rank)}
    if parallel.device == "cuda":
        bundle["GPU"] = float(parallel.ranks_per_node)
    bundles = [dict(bundle) for _ in range(parallel.nodes)]
    if parallel.serving_resource is not None:
        bundles[0][parallel.serving_resource] = 1.0
    return Placement(
        bundles=tuple(bundles),
        # Ray's SPREAD would put two on one machine where others are full
        strategy="STRICT_PACK" if parallel.nodes == 1 else "STRICT_SPREAD",
    )
