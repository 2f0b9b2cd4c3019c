"""Endpoints under load, in trouble, and as jobs: real Ray, many minutes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml
from hip_cluster.faults import Traffic
from hip_cluster.local import generate, local_endpoint, local_nodes

from tests.cluster.conftest import KEY, document, hip_cluster, said

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE = 600


def test_chaos_leaves_nothing_hung_and_nothing_behind():
    spec = importlib.util.spec_from_file_location("chaos", ROOT / "scripts" / "chaos.py")
    chaos = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(chaos)
    assert chaos.main() == 0


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


def test_without_a_router_a_draining_server_says_so_and_ends_its_requests(
    two_nodes, tiny_llama, tmp_path
):
    content = document(tiny_llama, name="plain")
    with local_endpoint(content, tmp_path, "--address", two_nodes.address) as endpoint:
        endpoint.wait_for("SERVING")
        headers = {"Authorization": f"Bearer {KEY}"}
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(generate, endpoint.url, list(range(1, 40)), 600, KEY)
            time.sleep(2)
            assert hip_cluster("drain", "plain").returncode == 0
            time.sleep(1)
            health = httpx.get(f"{endpoint.url}/health", headers=headers, timeout=60)
            assert health.status_code == 503
            body = {"text": "x", "sampling_params": {"max_new_tokens": 1}}
            late = httpx.post(f"{endpoint.url}/generate", json=body, headers=headers, timeout=60)
            assert late.status_code == 503
            assert late.headers["Retry-After"]
            assert not running.done()
            assert len(running.result()) == 600
        assert endpoint.process.wait(120) == 0


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
