"""What an endpoint's document will do, before anything runs."""

from __future__ import annotations

from typing import Any

from hip_cluster.budget import host_memory
from hip_cluster.placement import placement
from hip_cluster.spec import EndpointSpec
from hip_cluster.timing import hang_seconds


def sentences(spec: EndpointSpec) -> list[str]:
    """Placement, memory, access and patience of an endpoint, a line each."""
    parallel, asked, need = spec.parallel, placement(spec), host_memory(spec)
    ranks = "1 rank" if parallel.ranks == 1 else f"{parallel.ranks} ranks"
    lines = [
        f"endpoint {spec.name}: {spec.replicas} x {spec.model.path}",
        f"a replica is {ranks} (tp {parallel.tp}, pp {parallel.pp}) and asks Ray for "
        f"{asked.sentence()}",
        need.sentence(),
    ]
    if spec.offload is not None:
        share = need.offload_mib_per_rank / 1024
        lines.append(f"each rank offloads {share:.1f} GiB of KV to it")
    lines.append(_door(spec))
    if spec.auth.api_key_file is not None:
        lines.append(f"its key is read from {spec.auth.api_key_file}")
    elif spec.auth.api_key_env is not None:
        lines.append(f"its key is read from ${spec.auth.api_key_env}")
    else:
        lines.append("no key is asked for: whoever reaches the port may use it")
    limits = spec.limits
    lines.append(
        f"a rank with work and no step for {hang_seconds(spec):.0f} s, or silent for "
        f"{limits.silence_s:g} s, hangs; {limits.restarts} restarts in {limits.window_s:g} s are "
        "tried, and one more is a crash loop"
    )
    return lines


def facts(spec: EndpointSpec) -> dict[str, Any]:
    """The same for programs."""
    asked, need = placement(spec), host_memory(spec)
    return {
        "name": spec.name,
        "replicas": spec.replicas,
        "ranks": spec.parallel.ranks,
        "router": spec.router.mode,
        "placement": {"strategy": asked.strategy, "bundles": list(asked.bundles)},
        "memory_mib": {
            "total": need.total_mib,
            "offload": need.offload_mib,
            "offload_per_rank": need.offload_mib_per_rank,
            "staging": need.staging_mib,
            "shm": need.shm_mib,
            "reserve": need.reserve_mib,
        },
        "hang_s": hang_seconds(spec),
    }


def _door(spec: EndpointSpec) -> str:
    server = f"{spec.server.host}:{spec.server.port}"
    if spec.router.mode == "managed":
        return f"clients reach a router at {server}, which chooses a replica"
    if spec.router.mode == "external":
        return (
            f"no router is started: yours finds SGLang's server at {server} by its /health, which "
            f"answers 503 while it drains; it goes on to serve for {spec.router.notice_s:g} s then"
        )
    return f"clients reach SGLang's server at {server}, on the machine of the first rank"
