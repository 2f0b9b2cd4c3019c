"""One endpoint over two Ray nodes, TP=2, as a user has it: one boot for all of these."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import httpx
import psutil
import pytest
from hip_cluster.local import generate, local_endpoint
from hip_cluster.ports import free_port
from hip_cluster.state import home, read_door

from tests.cluster.conftest import KEY, client, document, hip_cluster, said
from tests.helm import chart
from tests.helm.queries import queries_of, unanswered

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]
PROMPT = [(7 * i * i + 3 * i) % 1000 + 1 for i in range(900)]


@pytest.fixture(scope="module")
def endpoint(two_nodes, tiny_llama, tmp_path_factory):
    content = document(tiny_llama, parallel={"tp": 2, "nodes": 2}, router={"mode": "managed"})
    content["server"]["arguments"].append("--enable-metrics-for-all-schedulers")
    folder = tmp_path_factory.mktemp("endpoint")
    with local_endpoint(content, folder, "--address", two_nodes.address) as running:
        running.wait_for("SERVING")
        yield running


@pytest.fixture
def one_process(tiny_llama, tmp_path, endpoint):
    """SGLang's own server with the same settings, and no Ray."""
    log, port = tmp_path / "log.txt", free_port("127.0.0.1")
    config = '{"dense_threshold": 256, "window": 64, "budget": 128}'
    line = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(tiny_llama)]
    line += ["--attention-backend", "hip_attention", "--hip-config", config, "--enable-metrics"]
    line += ["--max-total-tokens", "32768", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            line, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=10).status_code == 200:
                break
        except httpx.TransportError:
            time.sleep(0.5)
    assert process.poll() is None, log.read_text()[-3000:]
    yield url
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_two_nodes_give_the_tokens_of_one_process(endpoint, one_process):
    sampling = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": sampling}
    server = endpoint.status()["replicas"][0]["url"]
    before, ours_before = scrape(one_process), scrape(server)
    for _ in range(2):
        answer = httpx.post(f"{one_process}/generate", json=body, timeout=120).json()
    expected = answer["output_ids"]
    assert generate(endpoint.url, PROMPT, 24, KEY) == expected
    # and once more, from the prefix cache
    assert generate(endpoint.url, PROMPT, 24, KEY) == expected
    after, ours = scrape(one_process), scrape(server)
    assert counted(before, after) == counted(ours_before, ours)
    # what the router asks of it counts, too
    assert names(after) <= names(ours)


def scrape(url):
    return httpx.get(f"{url}/metrics", timeout=60).text


def names(text):
    found = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    assert {name for name in found if name.startswith("hip_sglang_")}
    return found


COUNTED = (
    'hip_sglang_query_blocks_total{kind="sparse",phase="decode"}',
    'hip_sglang_query_blocks_total{kind="dense",phase="prefill"}',
    'hip_sglang_choices_total{kind="fresh"}',
    'hip_sglang_visible_pages_total{phase="decode"}',
    "sglang:prompt_tokens_total",
    "sglang:generation_tokens_total",
    "sglang:cached_tokens_total",
    "sglang:num_requests_total",
)


def counted(before, after):
    """What came to some of the counters between two scrapes; each moved."""
    found = {name: total(after, name) - total(before, name) for name in COUNTED}
    assert all(found.values()), found
    return found


def total(text, name):
    lines = [line for line in text.splitlines() if re.match(re.escape(name) + r"[{ ]", line)]
    return sum(float(line.split()[-1]) for line in lines)


def test_one_scrape_has_the_rank_on_the_other_machine(endpoint):
    generate(endpoint.url, PROMPT[:50], 4, KEY)
    text = scrape(endpoint.status()["replicas"][0]["url"])
    queued = re.findall(r'^sglang:num_queue_reqs\{.*tp_rank="(\d)".*\} \S+', text, re.M)
    assert sorted(queued) == ["0", "1"]


def test_every_query_of_the_chart_is_answered_by_the_engine_and_its_supervisor(endpoint):
    """Ray mode's alerts, and the dashboard; nothing is sent to Ray's own agent."""
    chart.tools.fetch()
    values = chart.merged(chart.ci_values("ray-2x8"), {"monitoring": {"rules": True}})
    # twice: a prefix that is found. SGLang tells how long a token took after fifty of them
    for tokens in (60, 1):
        generate(endpoint.url, PROMPT, tokens, KEY)
    doors = [endpoint.status()["replicas"][0]["url"], read_door("test").url]
    scrapes = [httpx.get(f"{door}/metrics", timeout=60).text for door in doors]
    queries = queries_of(chart.render(values))
    assert {"HipEngineDown", "panel Recoveries A"} <= queries.keys()
    assert unanswered(queries, scrapes) == []


def test_the_ranks_stand_on_two_nodes(endpoint):
    ranks = endpoint.status()["replicas"][0]["ranks"]
    assert [rank["name"] for rank in ranks] == ["engine", "rank 0", "rank 1"]
    parents = {psutil.Process(rank["pid"]).ppid() for rank in ranks if rank["name"] != "engine"}
    assert len(parents) == 2


def test_without_the_key_nobody_gets_in_by_any_door(endpoint):
    server = endpoint.status()["replicas"][0]["url"]
    for url in (endpoint.url, server):
        answer = httpx.post(f"{url}/generate", json={"text": "x"}, timeout=30)
        assert answer.status_code == 401


def test_the_key_is_in_no_log_and_on_no_command_line(endpoint):
    lines = [
        " ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])
    ]
    assert not [line for line in lines if KEY in line]
    logs = [endpoint.log, *home().rglob("*.log")]
    assert not [log for log in logs if KEY in log.read_text()]


def test_commands_that_change_something_want_the_token(endpoint):
    url = read_door("test").url
    assert httpx.post(f"{url}/down", timeout=30).status_code == 401
    assert "hip_cluster_replicas" in httpx.get(f"{url}/metrics", timeout=30).text
    assert httpx.get(f"{url}/ready", timeout=30).status_code == 200


def test_a_request_has_one_id_in_the_log_of_router_server_and_every_rank(endpoint):
    with client(endpoint) as http:
        answer = http.post(
            "/generate",
            json={"text": "x", "sampling_params": {"max_new_tokens": 1}},
            headers={"X-Request-Id": "mine-17"},
        )
    assert answer.headers["x-request-id"] == "mine-17"
    rid = answer.json()["meta_info"]["id"]
    assert rid.startswith("mine-17.")
    expected = {("replica 0 engine", f"request {what}") for what in ("received", "answered")}
    for rank in (0, 1):
        expected |= {(f"replica 0 rank {rank}", f"request {what}") for what in ("queued", "ended")}
    deadline, found = time.monotonic() + 30, set()
    while found != expected and time.monotonic() < deadline:
        # what a rank prints comes a moment later
        time.sleep(0.2)
        lines = [line for line in log_of(endpoint.log) if line.get("request_id") == "mine-17"]
        found = {(line["process"], line["message"]) for line in lines}
    assert found == expected
    assert {line["rid"] for line in lines} == {rid}
    spans = [line.get("span", {}) for line in log_of(home() / "test" / "router.log")]
    assert "mine-17" in {span.get("request_id") for span in spans}


def log_of(path):
    """Every line is an object with a time and a message."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(line["timestamp"] and "message" in line for line in lines)
    return lines


def test_a_second_endpoint_on_its_port_is_refused_in_one_line(endpoint, tiny_llama, tmp_path):
    content = document(tiny_llama, name="second", router={"mode": "managed"})
    content["server"]["port"] = endpoint.spec.server.port
    with local_endpoint(content, tmp_path, "--address", "unused") as second:
        assert second.process.wait(120) == 2
        (line,) = second.log.read_text().splitlines()
    assert "is in use on 127.0.0.1" in line


@pytest.mark.soak
def test_a_wrong_token_is_refused_in_one_line(two_nodes, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "fedcba9876543210" * 4)
    content = document(tiny_llama, name="other")
    with local_endpoint(content, tmp_path, "--address", two_nodes.address) as other:
        assert other.process.wait(300) == 2
        (line,) = said(other)
    assert "refused the token" in line


def test_a_dead_rank_turns_clients_away_at_once_and_comes_back(endpoint):
    victim = endpoint.pid_of("rank 1")
    os.kill(victim, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with client(endpoint) as http:
            answer = http.post("/generate", json={"text": "x"})
        if answer.status_code == 503:
            break
    assert answer.status_code == 503
    assert answer.headers["Retry-After"]
    while (replica := endpoint.status()["replicas"][0])["attempt"] == 1:
        assert time.monotonic() < deadline + 60
        time.sleep(0.1)
    assert replica["error"] == "rank 1 died"
    assert replica["attempt"] == 2


def test_the_end_leaves_nothing_behind(endpoint, two_nodes):
    pids = [one["pid"] for one in endpoint.status()["replicas"][0]["ranks"]]
    assert hip_cluster("down", "test").returncode == 0
    assert endpoint.process.wait(60) == 0
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    with pytest.raises(httpx.TransportError):
        httpx.get(endpoint.url, timeout=5)
    script = (
        "import ray, sys; ray.init(sys.argv[1], logging_level='ERROR');"
        "from ray.util import placement_group_table as table;"
        "left = [g['state'] for g in table().values() if g['state'] != 'REMOVED'];"
        "print(left, ray.available_resources().get('CPU'))"
    )
    line = [sys.executable, "-c", script, two_nodes.address]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "[] 2.0"
