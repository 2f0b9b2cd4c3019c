"""Ray mode: what is rendered for KubeRay, and that nothing in it waits for itself."""

import json
import re

import pytest
from hip_cluster.placement import placement
from hip_cluster.spec import EndpointSpec

from tests.helm import chart


@pytest.fixture(scope="module")
def release():
    return chart.render(chart.CI["ray-2x8"])


def cluster(release):
    (found,) = release.all("RayCluster")
    return found["spec"]


def groups(release):
    return {group["groupName"]: group for group in cluster(release)["workerGroupSpecs"]}


def document(release, replica=0):
    config = release.one("ConfigMap", f"{replica}-endpoint")
    return EndpointSpec.parse(config["data"]["endpoint.yaml"])


def waits(release):
    """Who waits for whom: {what: what it needs first}, of the pods as KubeRay starts them."""
    head, workers = cluster(release)["headGroupSpec"]["template"], groups(release)
    supervisor = next(c for c in head["spec"]["containers"] if c["name"] == "supervisor")
    needs = {
        # a pod is ready when each of its containers is; one without probe is at once
        "head is ready": {"raylet of head"}
        | ({"endpoint serves"} if "readinessProbe" in supervisor else set()),
        "raylet of head": set(),
        # it asks Ray for machines, and Ray knows raylets
        "endpoint serves": {f"raylet of {name}" for name in workers},
        "cluster is ready": {"head is ready", *(f"{name} is ready" for name in workers)},
    }
    for name, group in workers.items():
        container = group["template"]["spec"]["containers"][0]
        # KubeRay's own init container waits for the head's Service, which may hide a head that is
        # not ready
        needs[f"raylet of {name}"] = {"head is ready"}
        probe = container.get("readinessProbe", {}).get("httpGet", {}).get("path")
        needs[f"{name} is ready"] = {"endpoint serves" if probe else f"raylet of {name}"}
    if release.all("RayJob"):
        # KubeRay submits a RayJob when the cluster is ready
        needs["endpoint serves"].add("cluster is ready")
    return needs


def circle(needs):
    """One circle among them, if there is any."""

    def walk(name, path):
        if name in path:
            return [*path, name]
        found = (walk(other, [*path, name]) for other in needs[name])
        return next((one for one in found if one), None)

    return next((one for name in needs if (one := walk(name, []))), None)


def test_nothing_waits_for_itself(release):
    needs = waits(release)
    assert needs["rank0 is ready"] == {"endpoint serves"}
    assert circle(needs) is None


def test_a_rayjob_or_a_probe_of_the_supervisor_would_be_a_circle(release):
    job = chart.Release(release.text + "\n---\nkind: RayJob\nmetadata: {name: x}\n")
    assert circle(waits(job)) is not None
    probed = re.sub(r"( +)- name: supervisor\n", r"\g<0>\1  readinessProbe: {}\n", release.text)
    assert circle(waits(chart.Release(probed))) is not None


def test_the_head_has_no_gpu_and_no_ranks(release):
    head = cluster(release)["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert head["rayStartParams"]["num-gpus"] == "0"
    for container in head["template"]["spec"]["containers"]:
        assert "nvidia.com/gpu" not in container["resources"]["limits"]


def test_the_service_selects_the_pod_that_serves_and_not_the_head():
    values = chart.merged(chart.ci_values("ray-2x8"), {"router": {"enabled": False}})
    release = chart.render(values)
    selector = release.one("Service")["spec"]["selector"]
    picked = {
        where.rsplit("/", 1)[1]
        for where, pod in release.pods()
        if where.startswith("RayCluster") and selector.items() <= pod["metadata"]["labels"].items()
    }
    assert picked == {"rank0"}


def test_the_router_discovers_the_pod_that_serves(release):
    args = release.one("Deployment", "router")["spec"]["template"]["spec"]["containers"][0]["args"]
    start = args.index("--selector") + 1
    wanted = dict(item.split("=") for item in args[start : start + 3])
    labels = {name: g["template"]["metadata"]["labels"] for name, g in groups(release).items()}
    assert [name for name in labels if wanted.items() <= labels[name].items()] == ["rank0"]


def test_one_worker_has_the_resource_that_the_serving_ranks_ask_for(release):
    parameters = {name: group["rayStartParams"] for name, group in groups(release).items()}
    # KubeRay writes the value into a shell's command line, so it is quoted twice
    offered = json.loads(parameters["rank0"]["resources"].strip("'"))
    assert offered == {"hip_rank0": 1}
    first, *others = placement(document(release)).bundles
    assert {name: first[name] for name in offered} == offered
    assert not [bundle for bundle in others if offered.keys() & bundle.keys()]
    assert "resources" not in parameters["ranks"]
    assert groups(release)["rank0"]["replicas"] == 1


def test_pods_are_as_many_as_the_document_s_nodes(release):
    spec = document(release)
    assert sum(group["replicas"] for group in groups(release).values()) == spec.parallel.nodes
    for group in groups(release).values():
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert limits["nvidia.com/gpu"] == str(spec.parallel.ranks_per_node)


def test_the_document_says_what_the_values_say(release):
    spec = document(release)
    assert spec.name == "x-hip-sglang-0"
    assert (spec.model.served_name, spec.model.context_length) == ("llama-3.1-405b", 1048576)
    assert (spec.parallel.tp, spec.parallel.nodes) == (16, 2)
    assert spec.router.mode == "external"
    assert spec.server.port == 30000
    assert spec.auth.api_key_file == "/etc/hip-sglang/auth/key"
    assert spec.limits.drain_s == 1800
    assert spec.offload is not None
    assert spec.offload.host_gib == 512


def test_prefixes_on_disk_lie_where_the_document_says():
    disk = {"gib": 500, "storageClass": "local-nvme"}
    values = chart.merged(chart.ci_values("ray-2x8"), {"engine": {"offload": {"disk": disk}}})
    release = chart.render(values)
    said = document(release).hip_config["offload"]["disk"]
    for group in groups(release).values():
        spec = group["template"]["spec"]
        mounts = {one["mountPath"]: one["name"] for one in spec["containers"][0]["volumeMounts"]}
        (volume,) = (one for one in spec["volumes"] if one["name"] == mounts[said["path"]])
        claim = volume["ephemeral"]["volumeClaimTemplate"]["spec"]
        assert claim["storageClassName"] == "local-nvme"
        size = claim["resources"]["requests"]["storage"]
        assert int(size.removesuffix("Mi")) >= said["gib"] * 1024


def test_each_replica_has_a_cluster_and_a_document_of_its_own():
    release = chart.render(chart.merged(chart.ci_values("ray-2x8"), {"engine": {"replicas": 3}}))
    names = [item["metadata"]["name"] for item in release.all("RayCluster")]
    assert names == [f"x-hip-sglang-{replica}" for replica in range(3)]
    assert [document(release, n).name for n in range(3)] == names
    for item in release.all("RayCluster"):
        volumes = item["spec"]["headGroupSpec"]["template"]["spec"]["volumes"]
        (endpoint,) = (volume for volume in volumes if volume["name"] == "endpoint")
        assert endpoint["configMap"]["name"] == f"{item['metadata']['name']}-endpoint"


@pytest.mark.parametrize(
    "change",
    [
        {"engine": {"hipConfig": {"budget": 8192}}},
        {"model": {"contextLength": 262144}},
        {"engine": {"extraArgs": ["--watchdog-timeout", "600"]}},
    ],
)
def test_a_changed_document_changes_every_pod_template(release, change):
    """The document is a file beside the pods, which KubeRay does not look at."""
    after = chart.render(chart.merged(chart.ci_values("ray-2x8"), change))
    old, new = dict(release.pods()), dict(after.pods())
    for where in old:
        if where.startswith("RayCluster"):
            assert old[where]["metadata"]["annotations"] != new[where]["metadata"]["annotations"]
    assert cluster(release)["upgradeStrategy"] == {"type": "Recreate"}


def test_ray_asks_for_a_token(release):
    assert cluster(release)["authOptions"]["mode"] == "token"
    supervisor = cluster(release)["headGroupSpec"]["template"]["spec"]["containers"][1]
    environment = {item["name"]: item for item in supervisor["env"]}
    assert environment["RAY_AUTH_MODE"]["value"] == "token"
    reference = environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
    # the Secret that KubeRay makes has the cluster's name
    assert reference == {"name": "x-hip-sglang-0", "key": "auth_token"}


def test_the_supervisor_and_ray_share_processes_sockets_and_object_store(release):
    """Seen here: in a process namespace of its own a driver finds no raylet, and gives up."""
    spec = cluster(release)["headGroupSpec"]["template"]["spec"]
    assert spec["shareProcessNamespace"] is True
    containers = spec["containers"]
    for path in ("/tmp", "/dev/shm"):
        names = {
            mount["name"]
            for container in containers
            for mount in container["volumeMounts"]
            if mount["mountPath"] == path
        }
        assert len(names) == 1


def test_every_part_is_scraped_at_a_port_that_it_has():
    more = {
        "monitoring": {"podMonitor": True},
        "networkPolicy": {"prometheus": [{"podSelector": {}}]},
    }
    release = chart.render(chart.merged(chart.ci_values("ray-2x8"), more))
    ports = {}
    for _, pod in release.pods():
        component = pod["metadata"]["labels"]["app.kubernetes.io/component"]
        for container in pod["spec"]["containers"]:
            names = {port["name"] for port in container.get("ports", [])}
            ports[component] = ports.get(component, set()) | names
    scraped = {
        item["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"]: item["spec"][
            "podMetricsEndpoints"
        ][0]["port"]
        for item in release.all("PodMonitor")
    }
    assert set(scraped) == {"engine", "router", "head"}
    assert all(port in ports[component] for component, port in scraped.items())
    spec = document(release)
    assert spec.supervisor.port == 8300
