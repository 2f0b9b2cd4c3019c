"""Break a running endpoint on purpose, and measure how it takes that.

`make chaos` holds the outcome to targets, `hip-sglang bench cluster` reports it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]

from hip_cluster.local import LocalEndpoint, LocalNodes

LOOK_SECONDS = 0.02
SEEN_SECONDS = 120.0
# a request that got no answer of any kind for so long is lost in the works
HUNG_SECONDS = 120.0
GONE_SECONDS = 15.0
PROMPT = [(7 * i) % 900 + 1 for i in range(40)]
SHARED_MEMORY = Path("/dev/shm")


@dataclass
class Outcome:
    """What a fault did. Seconds from the fault on, None where that did not happen."""

    fault: str
    seen_s: float | None = None  # no client is sent to the replica any more
    placed_s: float | None = None  # its next attempt has machines, and begins to load
    serving_s: float | None = None
    answered: int = 0  # of the requests that were sent all the time
    turned_away: int = 0  # told to come again
    cut: int = 0  # began, and ended with an error
    problems: list[str] = field(default_factory=list)


class Traffic:
    """Short requests and streams, one after another, and what became of them."""

    def __init__(self, url: str, key: str | None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(base_url=url, headers=headers, timeout=HUNG_SECONDS)
        self._stop = threading.Event()
        self.answered = self.turned_away = self.cut = self.unknown = 0
        self.problems: list[str] = []
        self._threads = [
            threading.Thread(target=self._run, args=(send,), daemon=True)
            for send in (self._short, self._stream)
        ]

    @contextmanager
    def running(self) -> Iterator[Traffic]:
        """While the block runs; afterwards every request has come to an end."""
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join(HUNG_SECONDS + 10)
            if any(thread.is_alive() for thread in self._threads):
                self.problems.append("a request hangs")

    def _run(self, send: Callable[[], None]) -> None:
        while not self._stop.wait(0.2):
            try:
                send()
            except httpx.TimeoutException:
                self.problems.append(f"a request got no answer in {HUNG_SECONDS:g} s")
            except httpx.TransportError:
                # closed: the client knows
                self.cut += 1

    def _body(self, tokens: int, stream: bool) -> dict[str, Any]:
        sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        return {"input_ids": PROMPT, "sampling_params": sampling, "stream": stream}

    def _short(self) -> None:
        self._count(self._client.post("/generate", json=self._body(4, False)))

    def _stream(self) -> None:
        tokens, events = 200, []
        with self._client.stream("POST", "/generate", json=self._body(tokens, True)) as answer:
            if answer.status_code != 200:
                answer.read()
                return self._count(answer)
            events = [line for line in answer.iter_lines() if line.startswith("data: {")]
        last = json.loads(events[-1].removeprefix("data: ")) if events else {}
        if "error" in last:
            self.cut += 1
        elif last.get("meta_info", {}).get("completion_tokens") == tokens:
            self.answered += 1
        else:
            self.problems.append("a stream ended early and looked complete")

    def _count(self, answer: httpx.Response) -> None:
        if answer.status_code == 200:
            self.answered += 1
        elif answer.status_code == 503 and "Retry-After" in answer.headers:
            self.turned_away += 1
        elif answer.headers.get("x-smg-error-code") == "model_not_found":
            self.unknown += 1
        elif answer.status_code >= 500:
            self.cut += 1
        else:
            self.problems.append(f"a request was answered {answer.status_code}")


def break_replica(
    name: str,
    endpoint: LocalEndpoint,
    key: str | None,
    fault: Callable[[], None],
    mend: Callable[[], None] = lambda: None,
) -> Outcome:
    """Do ``fault`` to a serving endpoint of one replica; ``mend`` is done once it was seen."""
    outcome = Outcome(name)
    with Traffic(endpoint.url, key).running() as traffic:
        time.sleep(2)
        attempt = endpoint.status()["replicas"][0]["attempt"]
        began = time.monotonic()
        fault()
        while outcome.seen_s is None or outcome.placed_s is None:
            waited = time.monotonic() - began
            replica = endpoint.status()["replicas"][0]
            if outcome.seen_s is None and (
                replica["state"] != "SERVING" or replica["attempt"] != attempt
            ):
                outcome.seen_s = waited
                mend()
            if replica["state"] in ("LOADING", "WARMING") and replica["attempt"] > attempt:
                outcome.placed_s = waited
            if waited > SEEN_SECONDS:
                outcome.problems.append(f"{replica['state']} after {waited:.0f} s")
                break
            time.sleep(LOOK_SECONDS)
        endpoint.wait_for("SERVING")
        outcome.serving_s = time.monotonic() - began
        time.sleep(2)
        served = traffic.answered
        time.sleep(2)
        if traffic.unknown:
            outcome.problems.append("clients were told that there is no such model")
        if traffic.answered == served:
            outcome.problems.append("it serves, and answers nobody")
    return _with_traffic(outcome, traffic)


def kill_rank(endpoint: LocalEndpoint, key: str | None) -> Outcome:
    """A rank's process dies."""
    victim = endpoint.pid_of("rank 1")
    return break_replica("rank killed", endpoint, key, lambda: os.kill(victim, signal.SIGKILL))


def stop_rank(endpoint: LocalEndpoint, key: str | None) -> Outcome:
    """A rank's process stops without dying."""
    victim = endpoint.pid_of("rank 1")
    outcome = break_replica("rank stopped", endpoint, key, lambda: os.kill(victim, signal.SIGSTOP))
    if psutil.pid_exists(victim):
        outcome.problems.append("the stopped process was left behind")
    return outcome


def kill_node(endpoint: LocalEndpoint, nodes: LocalNodes, key: str | None) -> Outcome:
    """A machine is gone, and later another one joins."""
    return break_replica("node killed", endpoint, key, nodes.kill_last, mend=nodes.add)


def kill_router(endpoint: LocalEndpoint, key: str | None) -> Outcome:
    """The router dies: the supervisor starts it again, and replicas know nothing of it.

    For some milliseconds the new one answers 404, until it has met the replicas.
    """
    outcome, old = Outcome("router killed"), endpoint.status()["router"]["pid"]
    with Traffic(endpoint.url, key).running() as traffic:
        time.sleep(1)
        began = time.monotonic()
        os.kill(old, signal.SIGKILL)
        while time.monotonic() - began < SEEN_SECONDS:
            new = endpoint.status()["router"]["pid"]
            if outcome.seen_s is None and new != old:
                outcome.seen_s = time.monotonic() - began
            if new not in (old, None):
                break
            time.sleep(LOOK_SECONDS)
        served = traffic.answered
        while traffic.answered == served and time.monotonic() - began < SEEN_SECONDS:
            time.sleep(LOOK_SECONDS)
        outcome.serving_s = time.monotonic() - began
        if endpoint.states() != ["SERVING"]:
            outcome.problems.append(f"a replica is {endpoint.states()}")
    return _with_traffic(outcome, traffic)


def kill_supervisor(endpoint: LocalEndpoint, free: Callable[[], str]) -> Outcome:
    """The supervisor dies: nothing of ours may be left. ``free`` says what Ray still holds."""
    outcome, status = Outcome("supervisor killed"), endpoint.status()
    pids = [rank["pid"] for replica in status["replicas"] for rank in replica["ranks"]]
    pids.append(status["router"]["pid"])
    began = time.monotonic()
    endpoint.process.kill()
    if endpoint.process.wait() == 0:
        outcome.problems.append("it ended with code 0")
    while time.monotonic() - began < GONE_SECONDS:
        left = [pid for pid in pids if psutil.pid_exists(pid)]
        if not left and not _listens(endpoint):
            outcome.seen_s = time.monotonic() - began
            break
        time.sleep(LOOK_SECONDS)
    else:
        outcome.problems.append(f"left after {GONE_SECONDS:g} s: {left}")
    if held := free():
        outcome.problems.append(f"Ray still holds {held}")
    return outcome


def kill_head(endpoint: LocalEndpoint, key: str | None) -> Outcome:
    """Ray's head dies below ``hip-cluster up``, which had started it."""
    outcome, began = Outcome("head killed"), time.monotonic()
    supervisor = _supervisor_of(endpoint)
    for process in psutil.Process(endpoint.process.pid).children(recursive=True):
        if "gcs_server" in process.name():
            process.kill()
    while psutil.pid_exists(supervisor) and time.monotonic() - began < SEEN_SECONDS:
        time.sleep(LOOK_SECONDS)
    outcome.seen_s = time.monotonic() - began
    endpoint.wait_for("SERVING")
    outcome.serving_s = time.monotonic() - began
    traffic = Traffic(endpoint.url, key)
    with traffic.running():
        time.sleep(3)
    if not traffic.answered:
        outcome.problems.append("it serves, and answers nobody")
    return _with_traffic(outcome, traffic)


def shared_memory() -> set[str]:
    """What stands in /dev/shm now."""
    return {entry.name for entry in SHARED_MEMORY.iterdir()} if SHARED_MEMORY.is_dir() else set()


def _supervisor_of(endpoint: LocalEndpoint) -> int:
    from hip_cluster.state import read_door

    return read_door(endpoint.spec.name).pid


def _listens(endpoint: LocalEndpoint) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((endpoint.spec.server.host, endpoint.spec.server.port)) == 0


def _with_traffic(outcome: Outcome, traffic: Traffic) -> Outcome:
    outcome.answered, outcome.turned_away = traffic.answered, traffic.turned_away
    outcome.cut = traffic.cut + traffic.unknown
    outcome.problems += sorted(set(traffic.problems))
    return outcome
