"""The supervisor's own metrics."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from hip_cluster.supervisor import Replica, State


class Metrics:
    """States, restarts and recoveries of one endpoint's replicas."""

    def __init__(self, endpoint: str) -> None:
        self.registry = CollectorRegistry()
        self._states = Gauge(
            "hip_cluster_replicas",
            "Replicas by state",
            ["endpoint", "state"],
            registry=self.registry,
        )
        self.restarts = self._counter("restarts", "Restarts after something broke", endpoint)
        self.router_restarts = self._counter("router_restarts", "Restarts of the router", endpoint)
        recovery = Histogram(
            "hip_cluster_recovery_seconds",
            "From the news of a death to serving again",
            ["endpoint"],
            buckets=(5, 10, 20, 40, 80, 160, 320, 640, 1280),
            registry=self.registry,
        )
        self.recovery = recovery.labels(endpoint)
        self._endpoint = endpoint

    def _counter(self, name: str, text: str, endpoint: str) -> Counter:
        counter = Counter(f"hip_cluster_{name}", text, ["endpoint"], registry=self.registry)
        return counter.labels(endpoint)

    def observe(self, replicas: Iterable[Replica]) -> None:
        """Count the states as they are now."""
        states = [replica.state for replica in replicas]
        for state in State:
            self._states.labels(self._endpoint, state.value).set(states.count(state))

    def text(self) -> bytes:
        """All of it in Prometheus' format."""
        return generate_latest(self.registry)
