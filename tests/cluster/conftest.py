"""Real endpoints on real Ray clusters of this machine, for the tests that need one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hip_cluster.local import LocalEndpoint, LocalNodes, local_nodes
from hip_cluster.ports import free_port
from hip_cluster.state import HOME_VARIABLE

from tests.tiny_llama import write_tiny_llama

KEY = "the-key-of-the-tests"
KEY_VARIABLE = "HIP_CLUSTER_TEST_KEY"
# small enough for the machine that the tests run on
MEMORY = {"staging_gib_per_rank": 0.25, "shm_gib": 0.25, "reserve_gib": 0.5}


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
            "arguments": ["--max-total-tokens", "32768", "--enable-metrics", "--sleep-on-idle"],
        },
        "auth": {"api_key_env": KEY_VARIABLE},
    }
    for key, value in more.items():
        content[key] = content.get(key, {}) | value if isinstance(value, dict) else value
    return content


def hip_cluster(*words: str) -> subprocess.CompletedProcess[str]:
    """``hip-cluster`` with these words."""
    line = [sys.executable, "-m", "hip_cluster.cli", *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=300)


def client(endpoint: LocalEndpoint) -> httpx.Client:
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.Client(base_url=endpoint.url, headers=headers, timeout=300)


def said(endpoint: LocalEndpoint) -> list[str]:
    """The lines that are meant for a person."""
    lines = endpoint.log.read_text().splitlines()
    return [line for line in lines if line.startswith("hip-cluster: ")]


@pytest.fixture(scope="session", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    mine = {
        HOME_VARIABLE: str(tmp_path_factory.mktemp("home")),
        KEY_VARIABLE: KEY,
        "HF_HUB_OFFLINE": "1",
    }
    before = dict(os.environ)
    os.environ.update(mine)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalNodes]:
    """A Ray cluster of two machines with a processor each, with a token."""
    with local_nodes((1, 1), tmp_path_factory.mktemp("nodes")) as nodes:
        yield nodes
