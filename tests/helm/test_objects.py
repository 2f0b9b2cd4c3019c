"""What the rendered objects say: selectors, probes, memory, permissions."""

import json
import re
from pathlib import Path

import pytest

from hip_sglang.config import HipConfig
from hip_sglang.kv.memory import GIB as GIBIBYTE
from hip_sglang.kv.memory import KVShape, MemoryPlan
from tests.helm import chart

CASES = chart.yaml.safe_load(
    (Path(__file__).parent.parent / "cluster" / "memory_cases.yaml").read_text()
)
STABLE = {"app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/component"}
GIB = 1024


@pytest.fixture(params=list(chart.CI))
def release(request):
    return chart.render(chart.CI[request.param])


def selectors(item):
    """Every label selector in an object that picks pods of this chart."""
    if isinstance(item, dict):
        for key, value in item.items():
            if key in ("matchLabels",) or (key == "selector" and "matchLabels" not in value):
                yield value
            else:
                yield from selectors(value)
    elif isinstance(item, list):
        for value in item:
            yield from selectors(value)


def engine(release):
    return release.one("Deployment", "engine")["spec"]["template"]["spec"]


def argument(container, name):
    return container["args"][container["args"].index(name) + 1]


def mebibytes(quantity):
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()
    return int(number) * (GIB if unit == "Gi" else 1)


def test_every_object_carries_the_common_labels(release):
    for item in release.objects:
        labels = item["metadata"]["labels"]
        assert {*STABLE, "app.kubernetes.io/part-of", "helm.sh/chart"} <= labels.keys()
        assert item["metadata"]["namespace"] == "ns"


def test_selectors_use_only_labels_that_never_change(release):
    ours = {"x", "hip-sglang"}
    for item in release.objects:
        for selector in selectors(item):
            if selector.get("app.kubernetes.io/instance") in ours:
                assert set(selector) <= STABLE


def test_an_upgrade_changes_no_selector(tmp_path):
    """Another version of chart and program, other values: the same selectors."""
    newer = tmp_path / "hip-sglang"
    chart.subprocess.run(["cp", "-r", str(chart.CHART), str(newer)], check=True)
    text = (newer / "Chart.yaml").read_text()
    (newer / "Chart.yaml").write_text(text.replace("0.1.0", "9.9.9"))
    command = [str(chart.tools.HELM["4"]), "template", "x", str(newer), "--namespace", "ns"]
    command += ["--values", str(chart.CI["minimal"]), "--set", "engine.tensorParallel=4"]
    after = chart.subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def picked(release):
        return {
            (item["kind"], item["metadata"]["name"]): list(selectors(item["spec"]))
            for item in release.objects
            if item["kind"] in ("Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy")
        }

    assert picked(chart.Release(after)) == picked(chart.render(chart.CI["minimal"]))


def test_services_select_pods_that_exist(release):
    pods = [pod["metadata"]["labels"] for _, pod in release.pods()]
    for kind in ("Service", "PodDisruptionBudget", "PodMonitor"):
        for item in release.all(kind):
            selector = item["spec"]["selector"]
            selector = selector.get("matchLabels", selector)
            assert any(selector.items() <= labels.items() for labels in pods)


def test_the_startup_probe_gives_the_minutes_that_were_asked_for():
    values = chart.merged(chart.ci_values("minimal"), {"probes": {"startupMinutes": 45}})
    probe = engine(chart.render(values))["containers"][0]["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 45 * 60
    assert "initialDelaySeconds" not in probe


def test_liveness_waits_longer_than_sglang_itself():
    values = chart.merged(chart.ci_values("minimal"), {"probes": {"healthTimeoutSeconds": 90}})
    container = engine(chart.render(values))["containers"][0]
    environment = {item["name"]: item.get("value") for item in container["env"]}
    assert environment["SGLANG_HEALTH_CHECK_TIMEOUT"] == "90"
    assert container["livenessProbe"]["timeoutSeconds"] > 90
    router = chart.render(values).one("Deployment", "router")["spec"]["template"]["spec"]
    assert int(argument(router["containers"][0], "--health-check-timeout-secs")) > 90


def test_every_health_probe_has_more_than_the_second_that_health_takes(release):
    for _, pod in release.pods():
        for container in pod["spec"]["containers"]:
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                if container.get(probe, {}).get("httpGet", {}).get("path") == "/health":
                    assert container[probe]["timeoutSeconds"] >= 2


@pytest.mark.parametrize("seconds", [60, 300, 7200])
def test_pods_that_go_wait_for_the_longest_request(seconds):
    values = chart.merged(chart.ci_values("standalone"), {"engine": {"maxRequestSeconds": seconds}})
    release = chart.render(values)
    for name in ("engine", "router"):
        spec = release.one("Deployment", name)["spec"]["template"]["spec"]
        pause = int(spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
        assert spec["terminationGracePeriodSeconds"] >= seconds + pause
    router = release.one("Deployment", "router")["spec"]["template"]["spec"]["containers"][0]
    assert int(argument(router, "--request-timeout-secs")) == seconds
    assert int(argument(router, "--shutdown-grace-period-secs")) == seconds
    annotations = release.one("Ingress")["metadata"]["annotations"]
    assert annotations["nginx.ingress.kubernetes.io/proxy-read-timeout"] == str(seconds)


@pytest.mark.parametrize("tokens", [4096, 131072, 4194304])
def test_doors_let_the_longest_prompt_through(tokens):
    values = chart.merged(chart.ci_values("standalone"), {"model": {"contextLength": tokens}})
    release = chart.render(values)
    router = release.one("Deployment", "router")["spec"]["template"]["spec"]["containers"][0]
    annotations = release.one("Ingress")["metadata"]["annotations"]
    size = annotations["nginx.ingress.kubernetes.io/proxy-body-size"]
    assert argument(router, "--max-payload-size") == size
    # an 8 MB prompt, and a token id of seven digits with its comma and space
    assert int(size) >= max(8_000_000, 9 * tokens)
    assert annotations["nginx.ingress.kubernetes.io/proxy-buffering"] == "off"


def test_host_memory_is_requested_as_it_is_limited(release):
    for where, pod in release.pods():
        for container in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]:
            resources = container["resources"]
            assert resources["limits"]["memory"] == resources["requests"]["memory"], where


def chart_values(spec):
    """The values that say what an endpoint's document says; None where the chart cannot."""
    parallel, memory = spec.get("parallel", {}), spec.get("memory", {})
    if parallel.get("pp", 1) > 1 or memory.get("shm_gib") == 0:
        return None
    nodes = parallel.get("nodes", 1)
    engine = {
        "mode": "ray" if nodes > 1 else "standalone",
        "tensorParallel": parallel.get("tp", 1),
        "replicas": spec.get("replicas", 1),
        "memory": {
            "stagingGiBPerRank": memory.get("staging_gib_per_rank", 4),
            "shmGiB": memory.get("shm_gib", 2),
            "reserveGiB": memory.get("reserve_gib", 10),
            "limitGiB": memory.get("limit_gib", 0),
        },
    }
    if nodes > 1:
        engine["nodes"] = nodes
    if "offload" in spec:
        engine["offload"] = {"enabled": True, "hostGiB": spec["offload"]["host_gib"]}
    model = {"contextLength": 64, "shape": {"layers": 2, "kvHeads": 48, "headDim": 64}}
    return {"engine": engine, "model": model}


@pytest.mark.parametrize(
    ("change", "source"),
    [
        ({}, {"emptyDir": {"sizeLimit": "1075200Mi"}}),
        ({"existingClaim": "mine"}, {"persistentVolumeClaim": {"claimName": "mine"}}),
    ],
)
def test_prefixes_on_disk_have_a_volume_that_holds_them(change, source):
    more = {"engine": {"offload": {"disk": change}}}
    release = chart.render(chart.merged(chart.ci_values("offload"), more))
    spec = release.one("Deployment", "engine")["spec"]["template"]["spec"]
    container = spec["containers"][0]
    config = HipConfig.load(
        json.loads(container["args"][container["args"].index("--hip-config") + 1])
    )
    (mount,) = (
        one
        for one in container["volumeMounts"]
        if one["mountPath"] == str(config.offload.disk.path)
    )
    assert "readOnly" not in mount
    assert {"name": mount["name"], **source} in spec["volumes"]
    # an emptyDir is the node's own disk, and the scheduler has to know
    asked = container["resources"]["requests"].get("ephemeral-storage")
    assert asked == source.get("emptyDir", {}).get("sizeLimit")
    if asked:
        assert mebibytes(asked) >= config.offload.disk.gib * 1024


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_host_memory_is_the_sum_that_hip_cluster_computes(case):
    change = chart_values(case["spec"])
    if change is None:
        pytest.skip("the chart has no words for it: pipeline stages, or no /dev/shm")
    values = chart.merged(chart.ci_values("minimal"), change)
    if "refused" in case:
        with pytest.raises(chart.RefusedError) as caught:
            chart.render(values)
        words = case["refused"].replace("memory.limit_gib", "engine.memory.limitGiB")
        assert words in str(caught.value) or "does not divide" in str(caught.value)
        return
    for where, pod in chart.render(values).pods():
        spec = pod["spec"]
        container = spec["containers"][0]
        if container["name"] not in ("engine", "ray-worker"):
            continue
        assert mebibytes(container["resources"]["limits"]["memory"]) == case["mib"]["total"], where
        (shm,) = (volume for volume in spec["volumes"] if volume["name"] == "shm")
        assert mebibytes(shm["emptyDir"]["sizeLimit"]) == case["mib"]["shm"]


@pytest.mark.parametrize(
    ("layers", "kv_heads", "width", "tp", "dtype", "host_gib"),
    [
        (32, 8, 128, 1, "auto", 64),
        (80, 8, 128, 4, "fp8_e4m3", 100.5),
        (28, 4, 64, 2, "bfloat16", 7),
    ],
)
def test_host_memory_holds_the_tokens_that_offload_counts(
    layers, kv_heads, width, tp, dtype, host_gib
):
    model = {"num_hidden_layers": layers, "num_attention_heads": kv_heads * 4}
    model |= {"num_key_value_heads": kv_heads, "head_dim": width}
    shape = KVShape.of(model, itemsize=1 if dtype.startswith("fp8") else 2, tp=tp)
    plan = MemoryPlan.of(
        shape,
        HipConfig.load({"offload": {"host_gib": host_gib}}),
        host_bytes=int(host_gib * GIBIBYTE) // tp,
        context=1 << 20,
        running=1,
        device_bytes=None,
    )
    values = chart.merged(
        chart.ci_values("minimal"),
        {
            "model": {"shape": {"layers": layers, "kvHeads": kv_heads, "headDim": width}},
            "engine": {
                "tensorParallel": tp,
                "kvCacheDtype": dtype,
                "offload": {"enabled": True, "hostGiB": host_gib},
            },
        },
    )
    enough = chart.at("model.contextLength", plan.logical_tokens)
    assert chart.render(chart.merged(values, enough)).objects
    with pytest.raises(chart.RefusedError, match=f"holds {plan.logical_tokens} tokens"):
        chart.render(chart.merged(values, chart.at("model.contextLength", plan.logical_tokens + 1)))


def test_every_rank_of_a_pod_has_a_gpu():
    limits = engine(chart.render(chart.CI["standalone"]))["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "8"
    for where, pod in chart.render(chart.CI["ray-2x8"]).pods():
        if "worker" in pod["spec"]["containers"][0]["name"]:
            limits = pod["spec"]["containers"][0]["resources"]["limits"]
            assert limits["nvidia.com/gpu"] == "8", where
            assert limits["rdma/hca_shared_devices_a"] == "8", where


def test_only_what_asks_for_it_may_lock_memory(release):
    for where, pod in release.pods():
        for container in pod["spec"]["containers"]:
            added = container["securityContext"]["capabilities"].get("add", [])
            asked = container["name"] in ("engine", "ray-worker")
            assert added in ([], ["IPC_LOCK"]), where
            assert asked or added == [], where


def test_the_api_key_is_a_file():
    for name in ("standalone", "ray-2x8"):
        for where, pod in chart.render(chart.CI[name]).pods():
            for container in pod["spec"]["containers"]:
                names = {item["name"] for item in container.get("env", [])}
                assert "HIP_SGLANG_API_KEY" not in names, where
    container = engine(chart.render(chart.CI["standalone"]))["containers"][0]
    (path,) = (
        item["value"] for item in container["env"] if item["name"] == "HIP_SGLANG_API_KEY_FILE"
    )
    (mount,) = (item for item in container["volumeMounts"] if item["name"] == "auth")
    assert path == f"{mount['mountPath']}/key"
    assert mount["readOnly"]


def restricted(where, pod):
    """Kubernetes' Pod Security standard "restricted"."""
    spec = pod["spec"]
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        assert not spec.get(name), where
    kinds = {"configMap", "emptyDir", "secret", "persistentVolumeClaim", "ephemeral"}
    for volume in spec.get("volumes", []):
        assert set(volume) - {"name"} <= kinds, where
    assert spec["securityContext"]["runAsNonRoot"], where
    assert spec["securityContext"]["runAsUser"] > 0, where
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False, where
        assert security["readOnlyRootFilesystem"] is True, where
        assert security["capabilities"] == {"drop": ["ALL"]}, where
        assert "hostPort" not in str(container.get("ports")), where


@pytest.mark.parametrize("name", sorted(set(chart.CI) - {"ray-2x8", "offload"}))
def test_pods_meet_the_restricted_standard(name):
    for where, pod in chart.render(chart.CI[name]).pods():
        restricted(where, pod)


def test_only_the_router_has_a_token_and_it_may_only_look_at_pods(release):
    for where, pod in release.pods():
        assert pod["spec"]["automountServiceAccountToken"] == ("router" in where), where
    for role in release.all("Role"):
        assert role["rules"] == [
            {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
        ]
    assert release.all("ClusterRole") == []


def test_serving_pods_are_offline_and_only_read_the_model():
    for name in ("minimal", "airgapped", "ray-2x8"):
        for where, pod in chart.render(chart.CI[name]).pods():
            container = pod["spec"]["containers"][0]
            if container["name"] not in ("engine", "ray-worker"):
                continue
            assert {"name": "HF_HUB_OFFLINE", "value": "1"} in container["env"], where
            (mount,) = (item for item in container["volumeMounts"] if item["name"] == "models")
            assert mount["readOnly"], where


def test_another_model_is_another_job():
    def job(change):
        values = chart.merged(chart.ci_values("airgapped"), change)
        return chart.render(values).all("Job")[0]

    first = job({})
    other = job({"model": {"download": {"revision": "b" * 40}}})
    assert first["metadata"]["name"] != other["metadata"]["name"]
    assert job({"engine": {"cpu": "3"}}) == first
