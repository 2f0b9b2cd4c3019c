"""A Ray cluster of several nodes on this machine, and an endpoint on it, as child processes.

For trying and for breaking: `make demo-cluster`, `make chaos`, `hip-sglang bench cluster` and the
tests run on it.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import yaml

from hip_cluster import state
from hip_cluster.client import ask
from hip_cluster.ports import free_port
from hip_cluster.ray_cluster import PATIENCE
from hip_cluster.spec import EndpointSpec

START_SECONDS = 900.0
STOP_SECONDS = 60.0
LOOK_SECONDS = 0.05
OBJECT_STORE_BYTES = 80 << 20
AGENT_PORT = "dashboard_agent_listen_port"


class LocalNodes:
    """Ray nodes in a process of their own; the first one is the head."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.address, self.dashboard = self._answer().split()

    def kill_last(self) -> None:
        """A machine loses its power."""
        self._say("kill")

    def add(self) -> None:
        """A machine joins."""
        self._say("add")

    def kill_head(self) -> None:
        """Ray's head dies."""
        for process in psutil.Process(self._process.pid).children(recursive=True):
            if "gcs_server" in process.name():
                process.kill()

    def _say(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("local-nodes: "):
                return line.split(": ", 1)[1].strip()
        raise ChildProcessError("the local Ray nodes ended")


@contextmanager
def local_nodes(
    cpus: tuple[int, ...], folder: Path, dashboard: bool = False
) -> Iterator[LocalNodes]:
    """Nodes with so many (logical) processors each, behind a token; gone afterwards.

    The dashboard is also the server that takes jobs. Inside, this process has their token.
    """
    token = folder / "ray_token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), **PATIENCE}
    before = {name: os.environ[name] for name in settings if name in os.environ}
    os.environ.update(settings)
    process = subprocess.Popen(
        [sys.executable, "-m", "hip_cluster.local", str(int(dashboard)), *map(str, cpus)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield LocalNodes(process)
    finally:
        end_tree(process)
        for name in settings:
            os.environ.pop(name, None)
        os.environ.update(before)


class LocalEndpoint:
    """A supervisor in a process of its own, asked through its port."""

    def __init__(self, spec: EndpointSpec, process: subprocess.Popen[bytes], log: Path) -> None:
        self.spec, self.process, self.log = spec, process, log
        self.url = f"http://{spec.server.host}:{spec.server.port}"
        self._client = httpx.Client(timeout=30)

    def status(self) -> dict[str, Any]:
        """As `hip-cluster status` has it. Raises ValueError while it does not answer."""
        door = state.read_door(self.spec.name)
        try:
            found: dict[str, Any] = self._client.get(f"{door.url}/status").json()
        except httpx.TransportError as error:
            raise ValueError(f"the supervisor does not answer: {error}") from None
        return found

    def command(self, path: str, **body: int) -> dict[str, Any]:
        """One of the commands that change something, such as ``/scale``."""
        return ask(self.spec.name, "POST", path, body=body)

    def states(self) -> list[str]:
        """The replicas' states, in their order; empty while the supervisor does not answer."""
        with suppress(ValueError):
            return [str(replica["state"]) for replica in self.status()["replicas"]]
        return []

    def _states_for_clients(self) -> list[str]:
        with suppress(ValueError):
            return [
                f"{replica['state']}{'' if replica['clients'] else ' without clients'}"
                if replica["state"] == "SERVING"
                else str(replica["state"])
                for replica in self.status()["replicas"]
            ]
        return []

    def pid_of(self, name: str, replica: int = 0) -> int:
        """The process of the ``engine`` or of ``rank N``."""
        for one in self.status()["replicas"]:
            if one["replica"] == replica:
                return next(int(rank["pid"]) for rank in one["ranks"] if rank["name"] == name)
        raise ValueError(f"there is no replica {replica}")

    def wait_for(self, *states: str, seconds: float = START_SECONDS) -> float:
        """Until the replicas are in these states, and those that serve have clients.

        Returns how long that took. Raises TimeoutError.
        """
        began = time.monotonic()
        while (seen := self._states_for_clients()) != list(states):
            if self.process.poll() is not None:
                raise ChildProcessError(
                    f"the supervisor ended with code {self.process.returncode}: {self.last_words()}"
                )
            if time.monotonic() - began > seconds:
                raise TimeoutError(
                    f"{seen}, not {list(states)}, after {seconds:g} s; see {self.log}"
                )
            time.sleep(LOOK_SECONDS)
        return time.monotonic() - began

    def last_words(self) -> str:
        """What the supervisor said last."""
        lines = self.log.read_text(errors="replace").splitlines()
        ours = [line for line in lines if line.startswith("hip-cluster: ")]
        return [*ours, *lines[-1:], "nothing"][0]


@contextmanager
def local_endpoint(
    document: Mapping[str, Any], folder: Path, *words: str, up: bool = False
) -> Iterator[LocalEndpoint]:
    """Start ``python -m hip_cluster.serve`` (or ``hip-cluster up``), and end it afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = EndpointSpec.parse(yaml.safe_dump(dict(document)))
    file, log = folder / "endpoint.yaml", folder / "log.txt"
    file.write_text(yaml.safe_dump(dict(document)))
    os.environ.setdefault(state.HOME_VARIABLE, str(folder / "home"))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    program = ["hip_cluster.cli", "up", "-f"] if up else ["hip_cluster.serve"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *program, str(file), *words],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield LocalEndpoint(spec, process, log)
    finally:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        end_tree(process)


def generate(url: str, ids: list[int], tokens: int, key: str | None = None) -> list[int]:
    """Greedy tokens for one prompt. Raises httpx.HTTPError."""
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = {"input_ids": ids, "sampling_params": sampling}
    answer = httpx.post(f"{url}/generate", json=body, headers=headers, timeout=300)
    found: list[int] = answer.raise_for_status().json()["output_ids"]
    return found


def end_tree(process: subprocess.Popen[Any]) -> None:
    """End a child and all that it started."""
    with suppress(psutil.NoSuchProcess):
        family = [*psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(dashboard: bool, cpus: list[str]) -> None:
    """The nodes' process: takes ``kill`` and ``add`` from standard input, until that is closed."""
    from ray.cluster_utils import Cluster

    def node(count: str) -> dict[str, Any]:
        return {"num_cpus": int(count), "num_gpus": 0, "object_store_memory": OBJECT_STORE_BYTES}

    # another cluster of this machine may have Ray's own
    ports = {name: free_port("127.0.0.1") for name in ("dashboard_port", AGENT_PORT)}
    jobs = {"include_dashboard": dashboard, **ports}
    cluster = Cluster(initialize_head=True, head_node_args={**node(cpus[0]), **jobs})
    others = [cluster.add_node(**node(count)) for count in cpus[1:]]
    url = f"http://127.0.0.1:{jobs['dashboard_port']}"
    print("local-nodes:", cluster.address, url, flush=True)
    for line in sys.stdin:
        if line.strip() == "kill":
            cluster.remove_node(others.pop(), allow_graceful=False)
        elif line.strip() == "add":
            others.append(cluster.add_node(**node(cpus[-1])))
        print("local-nodes: done", flush=True)
    cluster.shutdown()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main(sys.argv[1] == "1", sys.argv[2:])
