"""What cannot work is refused by the render, with the path of the value."""

import pytest

from tests.helm import chart
from tests.helm.schema import SCHEMA, nodes, wrong_values

WRONG = list(wrong_values())
MINIMAL = chart.ci_values("minimal")


def refusal(values, *flags, helm="4", apis=chart.APIS):
    with pytest.raises(chart.RefusedError) as caught:
        chart.render(values, *flags, helm=helm, apis=apis)
    return str(caught.value)


def test_every_kind_of_wrong_value_is_tried():
    kinds = {wrong.why for wrong in WRONG}
    assert len(WRONG) > 300
    assert {"wrong type", "unknown key", "above its maximum", "wrong item", "empty"} <= kinds


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_the_schema_refuses(wrong):
    assert wrong.is_named_in(refusal(chart.merged(MINIMAL, wrong.values)))


@pytest.mark.soak
@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_the_schema_refuses_under_helm_3(wrong):
    assert wrong.is_named_in(refusal(chart.merged(MINIMAL, wrong.values), helm="3"))


def test_the_schema_knows_every_value_and_no_other():
    defaults = chart.yaml.safe_load((chart.CHART / "values.yaml").read_text())

    def leaves(value, path=()):
        if isinstance(value, dict) and value and path != ("engine", "hipConfig"):
            for key, child in value.items():
                yield from leaves(child, (*path, key))
        else:
            yield path

    written = set(leaves(defaults))
    known = {path for path, node in nodes() if "properties" not in node}
    free = ("resources", "headResources", "supervisorResources", "affinity", "headAffinity")
    known |= {path for path, _ in nodes() if path and path[-1] in (*free, "hipConfig")}

    def inside(path):
        return any(path[:n] in known for n in range(1, len(path)))

    assert {path for path in written if path not in known and not inside(path)} == set()
    assert {path for path in known if not inside(path)} <= {
        path[:n] for path in written for n in range(1, len(path) + 1)
    }
    assert SCHEMA["additionalProperties"] is False


# what only an eye on several values sees: (the example, what is changed, what the message names)
IMPOSSIBLE = {
    "no image": ("minimal", {"image": {"repository": ""}}, ["image.repository", "docker build"]),
    "no claim": (
        "minimal",
        {"model": {"storage": {"existingClaim": ""}}},
        ["model.storage.existingClaim"],
    ),
    "no repository": (
        "airgapped",
        {"model": {"download": {"repository": ""}}},
        ["model.download.repository"],
    ),
    "no revision": (
        "airgapped",
        {"model": {"download": {"revision": ""}}},
        ["model.download.revision"],
    ),
    "pods that share a volume for one": (
        "airgapped",
        {"engine": {"replicas": 2}, "model": {"storage": {"accessModes": ["ReadWriteOnce"]}}},
        ["model.storage.accessModes", "ReadWriteMany"],
    ),
    "a model of each pod's own on several": (
        "ray-2x8",
        {"model": {"source": "builtin"}},
        ["model.source=builtin"],
    ),
    "ranks that do not divide KV heads": (
        "standalone",
        {"engine": {"tensorParallel": 3}},
        ["engine.tensorParallel=3", "model.shape.kvHeads=8"],
    ),
    "ranks that do not divide query heads": (
        "airgapped",
        {"engine": {"tensorParallel": 8}, "model": {"shape": {"kvHeads": 8}}},
        ["engine.tensorParallel=8", "model.shape.attentionHeads=28"],
    ),
    "nodes that do not divide GPUs": (
        "ray-2x8",
        {"engine": {"nodes": 3}},
        ["engine.nodes=3", "engine.tensorParallel=16"],
    ),
    "offload of a model that is not described": (
        "offload",
        {"model": {"shape": {"layers": 0}}},
        ["model.shape.layers"],
    ),
    "a context larger than the host's memory": (
        "offload",
        {"engine": {"offload": {"hostGiB": 64}}},
        ["engine.offload.hostGiB=64", "524224 tokens", "model.contextLength=1048576"],
    ),
    "a disk without host memory": (
        "minimal",
        {"engine": {"offload": {"disk": {"gib": 100}}}},
        ["engine.offload.disk", "engine.offload.enabled"],
    ),
    "a claim for files that are not asked for": (
        "offload",
        {"engine": {"offload": {"disk": {"gib": 0, "existingClaim": "kv"}}}},
        ["engine.offload.disk.gib"],
    ),
    "two kinds of disk": (
        "offload",
        {"engine": {"offload": {"disk": {"existingClaim": "a", "storageClass": "b"}}}},
        ["engine.offload.disk.existingClaim=a", "engine.offload.disk.storageClass=b"],
    ),
    "a disk that pods share": (
        "offload",
        {"engine": {"replicas": 2, "offload": {"disk": {"existingClaim": "kv"}}}},
        ["engine.offload.disk.existingClaim=kv", "engine.offload.disk.storageClass"],
    ),
    "a pod larger than its node": (
        "offload",
        {"engine": {"memory": {"limitGiB": 200}}},
        ["engine.memory.limitGiB=200", "needs 284 GiB", "offloaded KV 256", "reserve 10"],
    ),
    "RDMA inside one pod": ("minimal", {"engine": {"rdma": {"enabled": True}}}, ["engine.rdma"]),
    "a key among the arguments": (
        "minimal",
        {"engine": {"extraArgs": ["--api-key=secret"]}},
        ["engine.extraArgs", "auth.existingSecret"],
    ),
    "a key among the router's arguments": (
        "minimal",
        {"router": {"extraArgs": ["--api-key", "secret"]}},
        ["router.extraArgs", "auth.existingSecret"],
    ),
    "an argument that the chart sets": (
        "minimal",
        {"engine": {"extraArgs": ["--port", "1"]}},
        ["engine.extraArgs", "--port"],
    ),
    "a secret in a variable": (
        "minimal",
        {"engine": {"extraEnv": [{"name": "HF_TOKEN", "value": "hf_secret"}]}},
        ["engine.extraEnv", "HF_TOKEN", "valueFrom.secretKeyRef"],
    ),
    "two keys": (
        "standalone",
        {"auth": {"generate": True}},
        ["auth.existingSecret", "auth.generate"],
    ),
    "an Ingress without host": ("standalone", {"ingress": {"host": ""}}, ["ingress.host"]),
    "a route without Gateway": (
        "locked-down",
        {"httpRoute": {"gateway": ""}},
        ["httpRoute.gateway"],
    ),
    "scaling what cannot be scaled": (
        "ray-2x8",
        {"autoscaling": {"enabled": True, "kind": "hpa"}},
        ["autoscaling.enabled"],
    ),
    "most replicas below the fewest": (
        "standalone",
        {"autoscaling": {"maxReplicas": 1}},
        ["autoscaling.maxReplicas=1", "autoscaling.minReplicas=2"],
    ),
    "KEDA without Prometheus": (
        "standalone",
        {"autoscaling": {"prometheusAddress": ""}},
        ["autoscaling.prometheusAddress"],
    ),
    "a Prometheus that may not scrape": (
        "standalone",
        {"networkPolicy": {"prometheus": []}},
        ["networkPolicy.prometheus"],
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_values_that_contradict_each_other_are_refused(case):
    name, change, named = case
    message = refusal(chart.merged(chart.ci_values(name), change))
    for part in named:
        assert part in message


@pytest.mark.parametrize(
    ("name", "change", "path", "api"),
    [
        ("ray-2x8", {}, "engine.mode=ray", "ray.io/v1"),
        ("standalone", {}, "autoscaling.kind=keda", "keda.sh/v1alpha1"),
        (
            "standalone",
            {"autoscaling": {"kind": "hpa"}},
            "autoscaling.kind=hpa",
            "custom.metrics.k8s.io/v1beta1",
        ),
        ("standalone", {}, "monitoring.podMonitor", "monitoring.coreos.com/v1"),
        ("standalone", {}, "monitoring.rules", "monitoring.coreos.com/v1"),
        ("locked-down", {}, "httpRoute.enabled", "gateway.networking.k8s.io/v1"),
    ],
)
def test_what_the_cluster_does_not_have_is_refused(name, change, path, api):
    without = [other for other in chart.APIS if other != api]
    message = refusal(chart.merged(chart.ci_values(name), change), apis=without)
    assert path in message
    assert api in message


def test_every_problem_is_told_at_once():
    message = refusal({})
    for path in ("image.repository", "model.storage.existingClaim"):
        assert path in message
