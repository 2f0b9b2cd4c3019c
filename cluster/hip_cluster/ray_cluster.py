"""The one place that asks Ray for machines: connect, place, start, give back.

Every call blocks; ``fleet.py`` makes them in threads.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hip_cluster import logs
from hip_cluster.budget import host_memory
from hip_cluster.link import set_keepalive
from hip_cluster.placement import Placement, placement
from hip_cluster.spec import EndpointSpec

NAMESPACE = "hip-cluster"
HEAD_PAUSE_SECONDS = 0.2
WAIT_SECONDS = 1.0
# a machine that is busy, or loads a model, is not dead: our own wires say sooner who is
PATIENCE = {
    "RAY_health_check_initial_delay_ms": "30000",
    "RAY_health_check_period_ms": "5000",
    "RAY_health_check_timeout_ms": "30000",
    "RAY_health_check_failure_threshold": "6",
}


class ClusterError(RuntimeError):
    """Ray cannot give what is asked for; its message is one line."""


@dataclass
class Attempt:
    """What one attempt to run a replica holds of Ray."""

    placement_group: Any
    engine: Any
    serving: Any  # the reference of the server's call, which ends with the engine


def require_token(wanted: bool, own_cluster: bool, folder: Path) -> None:
    """Switch Ray's token on, and make one for a cluster of our own. Raises ClusterError.

    Ray reads these variables when it is imported.
    """
    if not wanted:
        return
    mode = os.environ.setdefault("RAY_AUTH_MODE", "token")
    if mode != "token":
        raise ClusterError(
            f"RAY_AUTH_MODE={mode}, so whoever reaches Ray may run programs on it; "
            "set it to token, or say auth.ray_token: false"
        )
    given = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)
    if given or (Path.home() / ".ray" / "auth_token").is_file():
        return
    if not own_cluster:
        raise ClusterError(
            "there is no token for Ray; set RAY_AUTH_TOKEN_PATH to the file that holds the "
            "cluster's, or say auth.ray_token: false"
        )
    path = folder / "ray_token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)


class RayCluster:
    """A connection to Ray; made once a process."""

    def __init__(self, address: str | None, own: dict[str, Any] | None = None) -> None:
        """Connect to ``address``, or start a cluster on this machine with the resources ``own``.

        Raises ClusterError.
        """
        if importlib.util.find_spec("ray") is None:
            raise ClusterError("Ray is not installed; install it: pip install 'hip-sglang[ray]'")
        os.environ.update({name: PATIENCE[name] for name in PATIENCE if name not in os.environ})
        import ray

        self.own = own is not None
        self.closing = False  # set: nobody waits for machines any more
        try:
            ray.init(
                # without an address Ray would join whatever was last started on this machine
                address="local" if self.own else address or "auto",
                namespace=NAMESPACE,
                logging_level=logging.WARNING,
                include_dashboard=False if self.own else None,
                **(own or {}),
            )
        except Exception as error:
            # of many kinds, with pages of advice
            raise ClusterError(_connection_problem(address, error)) from None
        logs.take_over_from_ray()
        self.address: str = ray.get_runtime_context().gcs_address
        self.node = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]

    def nodes(self) -> list[dict[str, float]]:
        """What each living machine has in all: Ray's resources by name."""
        import ray

        found = ray.nodes()  # type: ignore[no-untyped-call]
        return [dict(node["Resources"]) for node in found if node["Alive"]]

    def missing(self, spec: EndpointSpec) -> str | None:
        """Why the machines that are there could never hold one replica; None where they can."""
        asked, need, nodes = placement(spec), host_memory(spec), self.nodes()
        fits = [node for node in nodes if _holds(node, asked.bundles[-1])]
        have = f"the cluster has {_listed(nodes, asked)}"
        if len(fits) < len(asked.bundles) or not any(_holds(n, asked.bundles[0]) for n in fits):
            return f"a replica needs {asked.sentence()}; {have}"
        roomy = [node for node in fits if _memory_mib(node) >= need.total_mib]
        if len(roomy) < len(asked.bundles):
            most = max(_memory_mib(node) for node in fits) / 1024
            return f"{need.sentence()}, and the largest has {most:.1f} GiB; see `memory`"
        return None

    def place(self, asked: Placement, name: str, seconds: float) -> Any:
        """Set machines aside; the placement group, or ClusterError where none come free."""
        import ray
        from ray.util.placement_group import placement_group

        group = placement_group(list(asked.bundles), strategy=asked.strategy, name=name)
        deadline = time.monotonic() + seconds
        try:
            while time.monotonic() < deadline and not self.closing:
                if group.wait(WAIT_SECONDS):
                    return group
        except ray.exceptions.RayError as error:
            raise ClusterError(f"Ray could not place it: {error}") from None
        self.give_back(group)
        raise ClusterError(
            f"no free machines in {seconds:g} s: a replica needs {asked.sentence()}; the cluster "
            f"has {_listed(self.nodes(), asked)}"
        )

    def start(self, group: Any, placement_group: Any, name: str) -> Attempt:
        """Start the engine, and through it the ranks."""
        from hip_cluster.engine import start_engine

        engine = start_engine(group, placement_group, name)
        return Attempt(placement_group, engine, engine.serve.remote())

    def end_of(self, attempt: Attempt) -> str | None:
        """Why the engine is not there any more; None while it is, or comes."""
        import ray

        done, _ = ray.wait([attempt.serving], timeout=0)
        if not done:
            return None
        try:
            ray.get(done[0])
        except ray.exceptions.RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            return f"the engine did not start: {[*lines, type(error).__name__][-1][:500]}"
        return "the engine ended"

    def end(self, attempt: Attempt) -> None:
        """End the engine and give the machines back, which ends every rank."""
        import ray

        ray.kill(attempt.engine)
        self.give_back(attempt.placement_group)

    def give_back(self, placement_group: Any) -> None:
        """Remove a placement group, with every actor in it."""
        from ray.util import remove_placement_group

        remove_placement_group(placement_group)

    def close(self) -> None:
        """Disconnect; a cluster of our own ends."""
        import ray

        ray.shutdown()


async def head_is_gone(address: str) -> None:
    """Returns when nobody listens at Ray's head any more: its connection ends with it."""
    host, port = address.rsplit(":", 1)
    while True:
        try:
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        except OSError:
            return
        set_keepalive(writer.get_extra_info("socket"))
        with suppress(OSError):
            # a head that lives hangs up on who says nothing, too: then it is asked again
            while await reader.read(4096):
                pass
        writer.close()
        await asyncio.sleep(HEAD_PAUSE_SECONDS)


def _holds(node: dict[str, float], bundle: dict[str, float]) -> bool:
    return all(node.get(name, 0.0) >= amount for name, amount in bundle.items())


def _memory_mib(node: dict[str, float]) -> float:
    # ray takes its object store off the machine's memory
    return (node.get("memory", 0.0) + node.get("object_store_memory", 0.0)) / 2**20


def _listed(nodes: list[dict[str, float]], asked: Placement) -> str:
    names = list(asked.bundles[0])
    each = [", ".join(f"{node.get(name, 0):g} {name}" for name in names) for node in nodes]
    count = "1 machine" if len(nodes) == 1 else f"{len(nodes)} machines"
    return f"{count} ({'; '.join(each)})"


def _connection_problem(address: str | None, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if "uthenticat" in str(error) or "token" in text.lower():
        return (
            f"Ray at {address or 'its address'} refused the token: {text}; set RAY_AUTH_TOKEN_PATH "
            "to the file that holds the cluster's"
        )
    if address is not None and _listens(address):
        return (
            f"Ray at {address} refused the token, or is no Ray that we know: {text}; set "
            "RAY_AUTH_TOKEN_PATH to the file that holds the cluster's"
        )
    return f"cannot reach Ray at {address or 'auto'}: {text}"


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
            return True
    except (OSError, ValueError):
        return False
