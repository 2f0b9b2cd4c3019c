"""The rendered pods run: what ci/cpu-values.yaml renders is started here, and does what it says.

Only mounts and Services are replaced (tests/helm/pod.py); arguments and variables are the chart's.
"""

import json
import os
import signal
import socket
import threading
import time
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path

import httpx
import psutil
import pytest
from hip_cluster import arguments
from hip_cluster.spec import EndpointSpec

from hip_sglang.config import HipConfig
from tests.helm import chart
from tests.helm.pod import ADDRESS, Machine, probe, wait_until_started
from tests.helm.queries import queries_of, unanswered
from tests.helm.test_network import COMPONENTS, allowed, labels

KEY = "sesame-of-the-tests"
HEADERS = {"Authorization": f"Bearer {KEY}"}
INIT_SECONDS = 300

needs_cpu = pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")


@pytest.fixture(scope="module")
def release():
    return chart.render(chart.CI["cpu"])


@pytest.fixture(scope="module")
def engine(release):
    return release.one("Deployment", "engine")["spec"]["template"]["spec"]


def port_of(container):
    (port,) = (item["containerPort"] for item in container["ports"] if item["name"] == "http")
    return port


@pytest.fixture(scope="module")
def machine(tmp_path_factory, engine):
    return machine_of(engine, tmp_path_factory.mktemp("pod"))


def machine_of(engine, root):
    """One with a folder for each mount of the engine, and the key."""
    container = engine["containers"][0]
    for mount in container["volumeMounts"]:
        (root / mount["mountPath"].strip("/")).mkdir(parents=True, exist_ok=True)
    (root / "etc/hip-sglang/auth/key").write_text(f"{KEY}\n")
    return Machine(root, {ADDRESS: f"http://127.0.0.1:{port_of(container)}"})


@pytest.fixture(scope="module")
def initialised(machine, engine):
    """What a pod does before its container starts."""
    for container in engine["initContainers"]:
        result = machine.run(container, INIT_SECONDS)
        assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def running(machine, engine, initialised):
    """(container, process, log) of the engine."""
    container = engine["containers"][0]
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # the port is the chart's: another program here may have it
        listener.bind(("0.0.0.0", port_of(container)))
    log = machine.root / "engine.log"
    with machine.start(container, log) as process:
        wait_until_started(container, process)
        yield container, process, log


def processes(process):
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


def url(container, path):
    return f"http://127.0.0.1:{port_of(container)}{path}"


def generate(container, tokens, prompt=300, timeout=600):
    body = {
        "input_ids": [100 + n % 1000 for n in range(prompt)],
        "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
    }
    return httpx.post(url(container, "/generate"), json=body, headers=HEADERS, timeout=timeout)


@pytest.mark.soak
@pytest.mark.server
@pytest.mark.timeout(1800)
@needs_cpu
class TestTheRenderedEngine:
    def test_its_probes_pass(self, running):
        container, _, _ = running
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert probe(container, name), name

    def test_no_command_line_and_no_log_holds_the_key(self, running):
        _, process, log = running
        lines = [Path(f"/proc/{one.pid}/cmdline").read_bytes() for one in processes(process)]
        assert len(lines) > 2
        assert not [line for line in lines if KEY.encode() in line]
        assert KEY not in log.read_text(errors="replace")

    def test_only_its_http_port_can_be_reached(self, running, release):
        container, process, _ = running
        open_ports = {
            connection.laddr.port
            for one in processes(process)
            for connection in one.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
            and not connection.laddr.ip.startswith(("127.", "::1"))
        }
        assert port_of(container) in open_ports
        # torch's store for its ranks listens everywhere, and only the pod itself may reach it
        everybody = [labels(component) for component in COMPONENTS] + [{"app": "stranger"}]
        for port, who in product(open_ports - {port_of(container)}, everybody):
            assert not allowed(release, who, labels("engine"), port)

    @pytest.mark.parametrize("check", ["health", "quote", "refusal"])
    def test_helm_test_passes(self, running, release, machine, check):
        (pod,) = (item for item in release.all("Pod") if item["metadata"]["name"].endswith(check))
        folder = machine.root / "etc/hip-sglang/test"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "check.py").write_text(release.one("ConfigMap", "test")["data"]["check.py"])
        result = machine.run(pod["spec"]["containers"][0], 300)
        assert result.returncode == 0, result.stdout + result.stderr
        assert result.stdout.startswith("ok")

    def test_every_query_is_answered_by_what_it_exports(self, running):
        container, _, _ = running
        # beyond dense_threshold, and twice: sparse blocks, and a prefix that is found
        for _ in range(2):
            assert generate(container, 80, prompt=9000).status_code == 200
        scrape = httpx.get(url(container, "/metrics")).text
        queries = queries_of(chart.render(chart.CI["standalone"]))
        assert {"HipEngineDown", "trigger 0", "trigger 1"} <= queries.keys()
        missing = unanswered(queries, [scrape])
        # the supervisor's, which only ray mode has
        assert [one for one in missing if ": hip_cluster_" not in one] == []

    def test_the_router_carries_long_prompts_and_long_streams(self, running, release, machine):
        """An 8 MB prompt, and a stream of five minutes, through the router as it is rendered."""
        container, _, _ = running
        with routed(container, release, machine) as (router, _):
            urls = [f"http://127.0.0.1:{port_of(one)}" for one in (router, container)]
            long = {"text": "quite long " * 800_000, "sampling_params": {"max_new_tokens": 1}}
            answers = [
                httpx.post(f"{url}/generate", json=long, headers=HEADERS, timeout=300)
                for url in urls
            ]
            # the engine's own words on a prompt that is longer than its context
            assert answers[0].status_code == answers[1].status_code == 400
            assert "context length" in answers[0].text
            assert httpx.post(f"{urls[0]}/generate", json={"text": "a"}).status_code == 401
            assert streamed_for(urls[0], 305) > 100

    def test_a_router_that_goes_finishes_what_it_began(self, running, release, machine):
        container, _, _ = running
        with routed(container, release, machine) as (router, process):
            answers = []
            asking = threading.Thread(target=lambda: answers.append(generate(router, 2000)))
            asking.start()
            time.sleep(3)
            os.kill(process.pid, signal.SIGTERM)
            time.sleep(2)
            assert not probe(router, "readinessProbe")
            # who has not heard of it is still answered, for five seconds
            assert generate(router, 4).status_code == 200
            time.sleep(8)
            assert not answers, "the request was to be running still"
            with pytest.raises(httpx.ConnectError):
                generate(router, 4)
            asking.join(600)
            (answer,) = answers
            assert answer.status_code == 200
            assert answer.json()["meta_info"]["completion_tokens"] == 2000
            assert process.wait(120) == 0

    @pytest.mark.kubernetes
    @pytest.mark.usefixtures("running")
    def test_the_router_finds_the_engine_s_pod_by_the_kubernetes_api(self, machine, kubernetes):
        """As rendered, as its service account: who is ready, who is not, and who is gone."""
        kubernetes.kubectl("create", "namespace", "ns")
        secret = ["create", "secret", "generic", "retrieval-api-key"]
        kubernetes.kubectl("--namespace", "ns", *secret, f"--from-literal=api-key={KEY}")
        values = chart.merged(chart.ci_values("cpu"), {"podDisruptionBudget": {"enabled": False}})
        kubernetes.helm("install", "x", str(chart.CHART), namespace="ns", values=values)
        pods = {
            name: kubernetes.one("ns", "deployment", f"x-hip-sglang-{name}")["spec"]["template"]
            for name in ("router", "engine")
        }
        router = pods["router"]["spec"]["containers"][0]
        # in place of the files with which the kubelet lets a pod in
        account = kubernetes.token("ns", pods["router"]["spec"]["serviceAccountName"])
        key = {"name": "HIP_SGLANG_ROUTER_KEY", "value": KEY}
        door = {"name": "KUBECONFIG", "value": str(kubernetes.kubeconfig(account, "ns"))}
        router["env"] = [*(one for one in router["env"] if "value" in one), key, door]
        with machine.start(router, machine.root / "discovering.log") as process:
            wait_until(lambda: probe(router, "livenessProbe"), process)
            # its Service sends nobody to a router that knows no engine
            assert not probe(router, "readinessProbe")
            kubernetes.start_pod("ns", "engine", pods["engine"])
            # without a model's name: so asks SGLang's frontend language
            wait_until(lambda: generate(router, 4).status_code == 200, process)
            assert probe(router, "readinessProbe")
            kubernetes.set_ready("ns", "engine", ready=False)
            wait_until(lambda: not probe(router, "readinessProbe"), process)
            assert generate(router, 4).status_code != 200
            kubernetes.set_ready("ns", "engine", ready=True)
            wait_until(lambda: probe(router, "readinessProbe"), process)
            # ready still, until its kubelet has ended it: new requests go elsewhere at once
            kubernetes.kubectl("--namespace", "ns", "delete", "pod", "engine", "--wait=false")
            assert kubernetes.one("ns", "pod", "engine")["metadata"]["deletionTimestamp"]
            wait_until(lambda: not probe(router, "readinessProbe"), process)
            lines = [Path(f"/proc/{one.pid}/cmdline").read_bytes() for one in processes(process)]
            assert not [line for line in lines if KEY.encode() in line]

    def test_probes_fail_when_it_is_killed(self, machine, engine, initialised):
        """One of its own, on another port: the others need theirs."""
        container = with_port(engine["containers"][0], 30100)
        with machine.start(container, machine.root / "killed.log") as process:
            wait_until_started(container, process)
            for name in ("livenessProbe", "readinessProbe"):
                assert probe(container, name)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for name in ("livenessProbe", "readinessProbe"):
                assert not probe(container, name)

    def test_a_pod_that_goes_finishes_what_it_began_and_begins_nothing(self, running, engine):
        """SIGTERM, as the kubelet sends it: the request that runs ends well, and readiness goes."""
        container, process, _ = running
        answers = []
        asking = threading.Thread(target=lambda: answers.append(generate(container, 1500)))
        asking.start()
        time.sleep(3)
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(1)
        assert not answers, "the request was to be running still"
        assert not probe(container, "readinessProbe")
        # routers know by now that it goes; who comes all the same is sent elsewhere
        turned_away = generate(container, 4)
        assert turned_away.status_code == 503
        assert turned_away.headers["Retry-After"]
        assert "shutting down" in turned_away.json()["message"]
        # 8 MB, which are read before they are refused
        assert generate(container, 4, prompt=1_600_000).status_code == 503
        assert httpx.get(url(container, "/metrics")).status_code == 200
        assert not answers, "the request was to be running still"
        asking.join(engine["terminationGracePeriodSeconds"])
        (answer,) = answers
        assert answer.status_code == 200
        assert answer.json()["meta_info"]["completion_tokens"] == 1500
        assert process.wait(engine["terminationGracePeriodSeconds"]) == 0
        for name in ("readinessProbe", "livenessProbe"):
            assert not probe(container, name)


def with_port(container, port):
    """The container with another port: one port of this machine serves one server at a time."""
    args = [str(port) if word == str(port_of(container)) else word for word in container["args"]]
    ports = [{**item, "containerPort": port} for item in container["ports"]]
    return {**container, "args": args, "ports": ports}


@contextmanager
def routed(container, release, machine):
    """(router, process) of the rendered router before the engine that runs."""
    spec = release.one("Deployment", "router")["spec"]["template"]["spec"]
    router = without_discovery(spec["containers"][0], f"http://127.0.0.1:{port_of(container)}")
    router["env"] = [*router["env"], {"name": "HIP_SGLANG_ROUTER_KEY", "value": KEY}]
    with machine.start(router, machine.root / "router.log") as process:
        wait_until(lambda: httpx.get(url(router, "/readiness")).status_code == 200, process)
        yield router, process


def without_discovery(container, worker):
    """The router with one engine that is named: there is no Kubernetes here to ask."""
    args = list(container["args"])
    args.remove("--service-discovery")
    for option, values in (("-namespace", 1), ("-port", 1), ("--selector", 3)):
        name = option if option.startswith("--") else f"--service-discovery{option}"
        start = args.index(name)
        del args[start : start + 1 + values]
    return {**container, "args": [*args, "--worker-urls", worker]}


def wait_until(answered, process, seconds=120):
    """Until the router answers so; raises ChildProcessError."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(httpx.TransportError):
            if answered():
                return
        time.sleep(1)
    raise ChildProcessError("the router does not answer as it should")


def streamed_for(url, seconds):
    """Reads a stream for so long; how many pieces came in its last ten seconds."""
    body = {
        "input_ids": list(range(100, 400)),
        "sampling_params": {"temperature": 0, "max_new_tokens": 30_000, "ignore_eos": True},
        "stream": True,
    }
    began, late = time.monotonic(), 0
    with httpx.stream("POST", f"{url}/generate", json=body, headers=HEADERS, timeout=60) as answer:
        for line in answer.iter_lines():
            passed = time.monotonic() - began
            late += passed > seconds - 10 and line.startswith("data:")
            if passed > seconds:
                return late
    raise AssertionError(f"the stream ended after {time.monotonic() - began:.0f} s")


def server_arguments(release):
    """What SGLang is told: on a command line, or by the document that the supervisor reads."""
    if found := release.all("RayCluster"):
        document = release.one("ConfigMap", "0-endpoint")["data"]["endpoint.yaml"]
        assert found[0]["metadata"]["name"] == EndpointSpec.parse(document).name
        return arguments.server_arguments(EndpointSpec.parse(document), "0.0.0.0", 30000)
    spec = release.one("Deployment", "engine")["spec"]["template"]["spec"]
    return ["--attention-backend", "hip_attention", *spec["containers"][0]["args"]]


@pytest.mark.parametrize("name", sorted(set(chart.CI) - {"cpu"}))
def test_sglang_s_own_parser_takes_the_arguments(name):
    words = server_arguments(chart.render(chart.CI[name]))
    config = json.loads(words[words.index("--hip-config") + 1])
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.server_args import prepare_server_args

    parsed = prepare_server_args(words)
    values = chart.ci_values(name)
    assert parsed.tp_size == values.get("engine", {}).get("tensorParallel", 1)
    assert parsed.served_model_name == values["model"]["name"]
    assert parsed.enable_metrics
    assert parsed._hip_config == HipConfig.load(config)


@pytest.mark.parametrize("name", chart.CI)
def test_smg_s_own_parser_takes_the_router_s_arguments(name):
    from smg.launch_router import parse_router_args

    spec = chart.render(chart.CI[name]).one("Deployment", "router")["spec"]["template"]["spec"]
    parsed = parse_router_args(spec["containers"][0]["args"])
    assert parsed.selector["app.kubernetes.io/component"] == "engine"
    assert parsed.service_discovery_port == 30000
    assert parsed.max_payload_size >= 1 << 24
