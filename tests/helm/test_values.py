"""No value is dead, and none is without a word."""

import re

import pytest

from tests.helm import chart

DEFAULTS = chart.yaml.safe_load((chart.CHART / "values.yaml").read_text())
PEER = {"podSelector": {"matchLabels": {"app": "other"}}}
RESOURCES = {"requests": {"cpu": "3"}, "limits": {"memory": "9Gi"}}
AFFINITY = {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": []}}
# where another value of the same type would not do
CHANGES = {
    "image.digest": "sha256:" + "a" * 64,
    "image.pullPolicy": "Always",
    "imagePullSecrets": ["other"],
    "model.source": "builtin",
    "model.storage.size": "7Gi",
    "model.storage.accessModes": ["ReadOnlyMany"],
    "model.download.repository": "other/model",
    "model.download.revision": "b" * 40,
    "model.download.allowPatterns": ["*.bin"],
    "model.download.endpoint": "https://other.internal",
    "model.download.resources": RESOURCES,
    "engine.mode": "ray",
    "engine.device": "cpu",
    "engine.tensorParallel": 4,
    "engine.nodes": 4,
    "engine.cpu": "3",
    "engine.kvCacheDtype": "fp8_e5m2",
    "engine.chunkedPrefillSize": 4096,
    "engine.hipConfig": {"budget": 1024},
    "engine.extraArgs": ["--watchdog-timeout", "600"],
    "engine.extraEnv": [{"name": "A", "value": "b"}],
    "engine.extraVolumes": [{"name": "more", "emptyDir": {}}],
    "engine.extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
    "engine.offload.deviceTokens": 131072,
    "engine.offload.missPolicy": "estimate",
    "engine.tolerations": [{"key": "a", "operator": "Exists"}],
    "engine.affinity": AFFINITY,
    "engine.cache.sizeLimit": "7Gi",
    "ray.version": "2.61.0",
    "ray.headResources": RESOURCES,
    "ray.supervisorResources": RESOURCES,
    "ray.headAffinity": AFFINITY,
    "router.policy": "least_load",
    "router.command": ["smg", "launch"],
    "router.extraArgs": ["--log-level", "debug"],
    "router.extraEnv": [{"name": "A", "value": "b"}],
    "router.resources": RESOURCES,
    "router.tolerations": [{"key": "a", "operator": "Exists"}],
    "router.affinity": AFFINITY,
    "service.type": "LoadBalancer",
    "httpRoute.hostnames": ["other.example.com"],
    "networkPolicy.clients": [PEER],
    "networkPolicy.prometheus": [PEER],
    "networkPolicy.kubernetesApi": [PEER],
    "networkPolicy.extraEgress": [{"to": [PEER]}],
    "autoscaling.kind": "hpa",
    "autoscaling.maxReplicas": 9,
    "autoscaling.prometheusAddress": "http://other:9090",
    "auth.generate": True,
}
MAPS = ("podLabels", "podAnnotations", "nodeSelector", "annotations", "labels")
# what has to go with a change, to be possible
WITH = {"engine.mode": {"engine": {"tensorParallel": 2}}}
# these are held against others and go nowhere: their refusals are in test_refusals.py
CHECKED_ONLY = {
    "engine.memory.limitGiB",
    "model.shape.layers",
    "model.shape.attentionHeads",
    "model.shape.kvHeads",
    "model.shape.headDim",
}


def leaves(value, path=()):
    for key, child in value.items():
        here = (*path, key)
        name = ".".join(here)
        if isinstance(child, dict) and child and name not in CHANGES:
            yield from leaves(child, here)
        else:
            yield name, child


LEAVES = dict(leaves(DEFAULTS))


def another(name, value):
    if name in CHANGES:
        return CHANGES[name]
    if name.split(".")[-1] in MAPS:
        return {"other": "value"}
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1 if name != "autoscaling.tokenUsageTarget" else 0.5
    assert isinstance(value, str), name
    return "other"


def value_at(values, name):
    for key in name.split("."):
        values = values[key]
    return values


def test_every_value_changes_a_rendered_object(value_name):
    for example in chart.CI:
        values = chart.merged(chart.ci_values(example), WITH.get(value_name, {}))
        new = another(value_name, value_at(chart.merged(DEFAULTS, values), value_name))
        try:
            before = chart.render(values)
            after = chart.render(chart.merged(values, chart.at(value_name, new)))
        except chart.RefusedError:
            continue
        if before.objects != after.objects:
            return
    pytest.fail(f"{value_name} changes nothing in any example")


def pytest_generate_tests(metafunc):
    if "value_name" in metafunc.fixturenames:
        metafunc.parametrize("value_name", sorted(set(LEAVES) - CHECKED_ONLY))


def test_every_value_has_a_comment():
    readme = (chart.CHART / "README.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^\| `([\w.]+)` \|", readme, re.MULTILINE))
    missing = {
        name
        for name in LEAVES
        if not any(name == path or name.startswith(f"{path}.") for path in told)
    }
    assert missing == set()


def test_generated_files_are_up_to_date():
    result = chart.subprocess.run(
        [chart.sys.executable, str(chart.ROOT / "scripts" / "write_chart.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout
