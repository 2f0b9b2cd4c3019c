"""Real endpoints on real Ray clusters of this machine, for the tests that need one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from hip_cluster.ports import free_port

from tests.tiny_llama import write_tiny_llama

KEY = "the-key-of-the-tests"
START_SECONDS = 400
# small enough for the machine that the tests run on
MEMORY = {"staging_gib_per_rank": 0.25, "shm_gib": 0.25, "reserve_gib": 0.5}


@dataclass
class Endpoint:
    """A supervisor in a process of its own, and the door to its endpoint."""

    name: str
    url: str
    home: Path
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def client(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=120)

    def generate(self, ids: Sequence[int], tokens: int = 16) -> list[int]:
        sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        body = {"input_ids": list(ids), "sampling_params": sampling}
        with self.client as client:
            answer = client.post("/generate", json=body).raise_for_status()
        found: list[int] = answer.json()["output_ids"]
        return found

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """``hip-cluster`` with these words."""
        line = [sys.executable, "-m", "hip_cluster.cli", *words]
        return subprocess.run(line, capture_output=True, text=True, env=self.environment)

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.home)

    def status(self) -> dict[str, Any]:
        import json

        done = self.command("status", self.name, "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def states(self) -> list[str]:
        return [replica["state"] for replica in self.status()["replicas"]]

    def pid_of(self, rank: str, replica: int = 0) -> int:
        (found,) = [r for r in self.status()["replicas"] if r["replica"] == replica]
        return next(one["pid"] for one in found["ranks"] if one["name"] == rank)

    def wait_for(self, *states: str, seconds: float = START_SECONDS) -> None:
        """Until the replicas are in these states, in their order."""
        deadline = time.monotonic() + seconds
        seen: list[str] | None = None
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                seen = self.states()
            except AssertionError:
                # its port is not open yet
                seen = None
            if seen == list(states):
                return
            time.sleep(0.3)
        pytest.fail(f"{seen} after {seconds} s\n{self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def environment(home: Path, **more: str) -> dict[str, str]:
    return {
        **os.environ,
        "HIP_SGLANG_CLUSTER_HOME": str(home),
        "HIP_CLUSTER_TEST_KEY": KEY,
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        **more,
    }


def document(model: Path, **more: Any) -> dict[str, Any]:
    """An endpoint of this model on a CPU; a section that is given is merged."""
    content: dict[str, Any] = {
        "name": "test",
        "model": {"path": str(model)},
        "hip": {"config": {"dense_threshold": 256, "window": 64, "budget": 128}},
        "parallel": {"device": "cpu"},
        "memory": MEMORY,
        "server": {
            "port": free_port("127.0.0.1"),
            "arguments": ["--max-total-tokens", "32768", "--enable-metrics"],
        },
        "auth": {"api_key_env": "HIP_CLUSTER_TEST_KEY"},
    }
    for key, value in more.items():
        content[key] = content.get(key, {}) | value if isinstance(value, dict) else value
    return content


def launch(
    content: dict[str, Any], folder: Path, *words: str, module: str = "hip_cluster.serve"
) -> Endpoint:
    """``python -m hip_cluster.serve`` with this document, not waited for."""
    file = folder / "endpoint.yaml"
    file.write_text(yaml.safe_dump(content))
    log = folder / "log.txt"
    line = [sys.executable, "-m", module]
    line += ["up", "-f", str(file), *words] if module == "hip_cluster.cli" else [str(file), *words]
    with log.open("wb") as output:
        process = subprocess.Popen(
            line,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment(folder / "home"),
        )
    url = f"http://127.0.0.1:{content['server']['port']}"
    return Endpoint(content["name"], url, folder / "home", log, process)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Ray cluster of two machines with a processor each, with a token."""
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text("0123456789abcdef" * 4)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "two_nodes.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdin
    address = ""
    for line in process.stdout:
        if line.startswith("address "):
            address = line.split()[1]
            break
    assert address
    yield address
    children = psutil.Process(process.pid).children(recursive=True)
    process.stdin.close()
    process.wait(60)
    psutil.wait_procs(children, 10)
