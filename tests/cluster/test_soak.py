"""Endpoints under load, in trouble, and as jobs: real Ray, many minutes."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from hip_cluster.faults import Traffic
from hip_cluster.local import generate, local_endpoint, local_nodes
from hip_cluster.ports import free_port
from hip_cluster.router import KEY_VARIABLE
from hip_cluster.state import read_door

from tests.cluster.conftest import KEY, document, hip_cluster, said

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE = 600


def test_chaos_leaves_nothing_hung_and_nothing_behind():
    spec = importlib.util.spec_from_file_location("chaos", ROOT / "scripts" / "chaos.py")
    chaos = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(chaos)
    before = dict(os.environ)
    assert chaos.main() == 0
    # such as another cluster's token
    assert dict(os.environ) == before


def test_scaling_and_a_rolling_restart_lose_no_request(two_nodes, tiny_llama, tmp_path):
    content = document(tiny_llama, name="rolling", replicas=2, router={"mode": "managed"})
    with local_endpoint(content, tmp_path, "--address", two_nodes.address) as endpoint:
        endpoint.wait_for("SERVING", "SERVING")
        with Traffic(endpoint.url, KEY).running() as traffic:
            time.sleep(2)
            assert hip_cluster("restart", "rolling").returncode == 0
            deadline = time.monotonic() + PATIENCE
            while [one["attempt"] for one in endpoint.status()["replicas"]] != [2, 2]:
                assert time.monotonic() < deadline
                time.sleep(0.5)
            endpoint.wait_for("SERVING", "SERVING")
            assert hip_cluster("scale", "rolling", "1").returncode == 0
            endpoint.wait_for("SERVING")
            assert hip_cluster("scale", "rolling", "2").returncode == 0
            endpoint.wait_for("SERVING", "SERVING")
        assert traffic.answered > 50
        assert (traffic.cut, traffic.turned_away, traffic.problems) == (0, 0, [])
        assert hip_cluster("drain", "rolling").returncode == 0
        assert endpoint.process.wait(120) == 0


def test_without_a_router_clients_of_a_dead_rank_are_cut_and_of_a_draining_one_served(
    two_nodes, tiny_llama, tmp_path
):
    content = document(tiny_llama, name="plain")
    with local_endpoint(content, tmp_path, "--address", two_nodes.address) as endpoint:
        endpoint.wait_for("SERVING")
        headers = {"Authorization": f"Bearer {KEY}"}
        sampling = {"temperature": 0, "max_new_tokens": 8000, "ignore_eos": True}
        body = {"input_ids": [1, 2, 3], "sampling_params": sampling, "stream": True}
        with (
            httpx.Client(headers=headers, timeout=60) as http,
            http.stream("POST", f"{endpoint.url}/generate", json=body) as answer,
        ):
            lines = answer.iter_lines()
            assert next(lines).startswith("data: {")
            os.kill(endpoint.pid_of("rank 0"), signal.SIGKILL)
            began = time.monotonic()
            with pytest.raises(httpx.TransportError):
                list(lines)
            assert time.monotonic() - began < 5
        while endpoint.status()["replicas"][0]["attempt"] == 1:
            time.sleep(0.1)
        endpoint.wait_for("SERVING")
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(generate, endpoint.url, list(range(1, 40)), 600, KEY)
            time.sleep(2)
            assert hip_cluster("drain", "plain").returncode == 0
            time.sleep(1)
            health = httpx.get(f"{endpoint.url}/health", headers=headers, timeout=60)
            assert health.status_code == 503
            assert not running.done()
            assert len(running.result()) == 600
        assert endpoint.process.wait(120) == 0


@contextmanager
def foreign_router(folder, server):
    """The chart's router, which nobody tells of replicas: here it reads them in a file."""
    port, manifest = free_port("127.0.0.1"), folder / "workers.json"
    manifest.write_text(json.dumps({"version": 1, "workers": [{"url": server}]}))
    line = [sys.executable, "-m", "hip_cluster.router", "--port", str(port)]
    line += ["--prometheus-port", str(free_port("127.0.0.1"))]
    line += ["--discovery-provider", "file", "--discovery-file", str(manifest)]
    line += ["--health-check-interval-secs", "1", "--health-failure-threshold", "1"]
    environment = {**os.environ, KEY_VARIABLE: KEY}
    with (folder / "foreign.log").open("wb") as log:
        process = subprocess.Popen(line, stdout=log, stderr=log, env=environment)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def test_a_router_that_is_not_ours_finds_the_replica_and_loses_nothing_when_it_drains(
    two_nodes, tiny_llama, tmp_path
):
    content = document(tiny_llama, name="foreign", router={"mode": "external", "notice_s": 6.0})
    with local_endpoint(content, tmp_path, "--address", two_nodes.address) as endpoint:
        endpoint.wait_for("SERVING")
        assert "router not ours" in hip_cluster("status", "foreign").stdout
        family = psutil.Process(endpoint.process.pid).children(recursive=True)
        assert not [one for one in family if "hip_cluster.router" in one.cmdline()]
        supervisor = read_door("foreign").url
        with foreign_router(tmp_path, endpoint.url) as url, ThreadPoolExecutor(1) as pool:
            deadline, headers = time.monotonic() + 60, {"Authorization": f"Bearer {KEY}"}
            body = {"text": "x", "sampling_params": {"max_new_tokens": 1}}
            while time.monotonic() < deadline:
                try:
                    answer = httpx.post(f"{url}/generate", json=body, headers=headers, timeout=60)
                    if answer.status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.2)
            assert answer.status_code == 200
            with Traffic(url, KEY).running() as traffic:
                time.sleep(2)
                running = pool.submit(generate, url, list(range(1, 40)), 600, KEY)
                time.sleep(1)
                assert hip_cluster("drain", "foreign").returncode == 0
                assert httpx.get(f"{supervisor}/ready", timeout=30).status_code == 503
                assert httpx.get(f"{endpoint.url}/health", timeout=30).status_code == 503
                assert len(running.result()) == 600
                assert endpoint.process.wait(120) == 0
                time.sleep(2)
        assert traffic.answered
        # whoever came later was turned away: what smg says without a worker is smg's affair
        assert traffic.turned_away + traffic.unknown
        assert (traffic.cut, traffic.problems) == (0, [])


def test_kv_in_host_memory_gives_the_same_tokens_under_ray(two_nodes, tiny_llama, tmp_path):
    prompt, found = [(11 * i * i + i) % 1000 + 1 for i in range(3000)], []
    parallel = {"tp": 2, "nodes": 2}
    # which offload does without
    hip = {"config": {"dense_threshold": 256, "window": 64, "budget": 128, "second_look": 0}}
    for name, more in (("resident", {}), ("offloaded", {"offload": {"host_gib": 0.25}})):
        content = document(tiny_llama, name=name, parallel=parallel, hip=hip, **more)
        if more:
            # the host store says how many tokens there are
            content["server"]["arguments"] = content["server"]["arguments"][2:]
        folder = tmp_path / name
        with local_endpoint(content, folder, "--address", two_nodes.address) as endpoint:
            endpoint.wait_for("SERVING")
            # cold, and from the prefix cache
            found += [generate(endpoint.url, prompt, 32, KEY) for _ in range(2)]
    assert found == [found[0]] * 4


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"parallel": {"tp": 2, "nodes": 2, "cpus_per_rank": 64}}, "2 machines with 64 CPU free"),
        ({"parallel": {"tp": 3, "nodes": 3}}, "the cluster has 2 machines (1 CPU; 1 CPU)"),
        ({"memory": {"reserve_gib": 60000}}, "and the largest has"),
        ({"model": {"path": "/no/such/model"}}, "model.path=/no/such/model does not exist on"),
        ({"server": {"arguments": ["--no-such-flag"]}}, "unrecognized arguments: --no-such-flag"),
    ],
)
def test_what_can_never_run_is_told_in_one_line(two_nodes, tiny_llama, tmp_path, more, words):
    content = document(tiny_llama, name="wrong", limits={"restarts": 0, "place_s": 2.0})
    for key, value in more.items():
        content[key] = content.get(key, {}) | value
    with local_endpoint(content, tmp_path, "--address", two_nodes.address) as endpoint:
        assert endpoint.process.wait(PATIENCE) == 2
        (line,) = said(endpoint)
    assert words in line


def test_a_port_that_is_taken_is_told_in_one_line(two_nodes, tiny_llama, tmp_path):
    content = document(tiny_llama, name="taken", limits={"restarts": 0})
    with (
        socket.create_server(("127.0.0.1", content["server"]["port"])),
        local_endpoint(content, tmp_path, "--address", two_nodes.address) as endpoint,
    ):
        assert endpoint.process.wait(PATIENCE) == 2
        (line,) = said(endpoint)
    assert f"server.port={content['server']['port']} is in use on 127.0.0.1" in line


def test_without_a_token_nothing_starts(two_nodes, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("HOME", str(tmp_path))
    content = document(tiny_llama, name="tokenless")
    with local_endpoint(content, tmp_path, "--address", two_nodes.address) as endpoint:
        assert endpoint.process.wait(60) == 2
        (line,) = said(endpoint)
    assert "there is no token for Ray; set RAY_AUTH_TOKEN_PATH" in line


def test_an_endpoint_runs_as_a_job_and_a_batch_on_it(tiny_llama, tmp_path, monkeypatch):
    """By ``hip-cluster submit`` twice, which is one job, and a batch by ``ray job submit``."""
    content = document(tiny_llama, name="job", supervisor={"port": 0})
    file = tmp_path / "endpoint.yaml"
    file.write_text(yaml.safe_dump(content))
    questions, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    questions.write_text("".join(f'{{"prompt": "question {n}"}}\n' for n in range(20)))
    # a job's `python` is the one of the machine that runs it
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    with local_nodes((2,), tmp_path, dashboard=True) as nodes:
        address = nodes.dashboard
        first = hip_cluster("submit", "-f", str(file), "--address", address, "--no-wait")
        assert first.returncode == 0, first.stderr
        second = hip_cluster("submit", "-f", str(file), "--address", address, "--no-wait")
        assert "runs already" in second.stdout
        deadline, url = time.monotonic() + PATIENCE, f"http://127.0.0.1:{content['server']['port']}"
        headers = {"Authorization": f"Bearer {KEY}"}
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{url}/health", headers=headers, timeout=30).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(1)
        batch = ["python", "-m", "hip_cluster.batch", "--url", url, "--input", str(questions)]
        batch += ["--output", str(answers), "--api-key-env", "HIP_CLUSTER_TEST_KEY"]
        ray = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", address]
        done = subprocess.run([*ray, "--", *batch], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(answers.read_text().splitlines()) == 20
        assert hip_cluster("down", "job").returncode == 0
