"""Every example renders, on both helms and every Kubernetes, to objects that its API accepts."""

import json
import re
import tarfile

import pytest

from tests.helm import chart

EVERY = [(helm, version) for helm in chart.tools.HELM for version in chart.tools.KUBERNETES]


def every_value(item):
    if isinstance(item, dict):
        for value in item.values():
            yield from every_value(value)
    elif isinstance(item, list):
        for value in item:
            yield from every_value(value)
    else:
        yield item


@pytest.mark.parametrize("helm", chart.tools.HELM)
@pytest.mark.parametrize("name", chart.CI)
def test_lint_finds_nothing(name, helm):
    said = chart.run("lint", "--strict", str(chart.CHART), "-f", str(chart.CI[name]), helm=helm)
    assert "0 chart(s) failed" in said
    assert "[WARNING]" not in said


@pytest.mark.parametrize(("helm", "version"), EVERY)
@pytest.mark.parametrize("name", chart.CI)
def test_the_api_accepts_every_object(name, helm, version):
    release = chart.render(chart.CI[name], helm=helm, kubernetes=version)
    wrong = [problem for item in release.objects for problem in chart.problems(item, version)]
    assert wrong == []
    # an empty template writes nulls, which the API drops without a word
    assert None not in list(every_value(release.objects))


@pytest.mark.parametrize("helm", chart.tools.HELM)
def test_a_package_holds_what_its_pods_run_and_no_example(helm, tmp_path):
    chart.run("package", str(chart.CHART), "--destination", str(tmp_path), helm=helm)
    with tarfile.open(tmp_path / "hip-sglang-0.1.0.tgz") as package:
        names = {name.removeprefix("hip-sglang/") for name in package.getnames()}
    assert {"values.schema.json", "README.md", "files/model.py", "files/check.py"} <= names
    assert not [name for name in names if name.startswith("ci/")]


PEERS = [{"podSelector": {}}, {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}]
# what no example has
VARIANTS = {
    "hpa": ("standalone", {"autoscaling": {"kind": "hpa", "queueTarget": 1.5}}),
    "generated key": ("minimal", {"auth": {"generate": True}}),
    "no router": ("standalone", {"router": {"enabled": False}}),
    "ray, watched": (
        "ray-2x8",
        {
            "monitoring": {"podMonitor": True, "rules": True},
            "networkPolicy": {"prometheus": PEERS, "extraEgress": [{"to": PEERS}]},
            "ray": {"existingAuthSecret": "ray-token"},
        },
    ),
    "everything added": (
        "airgapped",
        {
            "engine": {
                "extraArgs": ["--watchdog-timeout", "600"],
                "extraEnv": [
                    {"name": "A", "value": "b"},
                    {"name": "B", "valueFrom": {"secretKeyRef": {"name": "c", "key": "d"}}},
                ],
                "extraVolumes": [{"name": "more", "emptyDir": {}}],
                "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
                "podLabels": {"team": "a"},
                "podAnnotations": {"note": "b"},
                "nodeSelector": {"zone": "a"},
                "tolerations": [{"key": "a", "operator": "Exists", "effect": "NoSchedule"}],
                "affinity": {"nodeAffinity": {}},
                "priorityClassName": "high",
                "runtimeClassName": "nvidia",
                "memory": {"lock": True},
            },
            "router": {"tolerations": [{"operator": "Exists"}], "affinity": {"podAffinity": {}}},
            "service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
            "networkPolicy": {"clients": PEERS, "kubernetesApi": PEERS},
        },
    ),
}


@pytest.mark.parametrize("version", [chart.tools.KUBERNETES[0], chart.tools.KUBERNETES[-1]])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_api_accepts_what_no_example_has(name, version):
    example, change = VARIANTS[name]
    release = chart.render(chart.merged(chart.ci_values(example), change), kubernetes=version)
    wrong = [problem for item in release.objects for problem in chart.problems(item, version)]
    assert wrong == []
    assert None not in list(every_value(release.objects))


def test_the_notes_say_how_to_ask():
    # helm 3 renders notes only where it reaches a cluster
    command = ["install", "x", str(chart.CHART), "--dry-run=client", "--namespace", "ns"]
    said = chart.run(*command, "-f", str(chart.CI["cpu"]))
    notes = said[said.index("NOTES:") :]
    assert "helm -n ns test x" in notes
    assert "curl localhost:8000/v1/completions" in notes
    assert "get secret retrieval-api-key" in notes
    assert "<no value>" not in said
    assert "Everybody who reaches it" not in notes


def test_artifact_hub_can_read_what_it_is_told():
    """Its annotations are strings, of which some hold YAML."""
    about = chart.yaml.safe_load((chart.CHART / "Chart.yaml").read_text())["annotations"]
    told = {name.removeprefix("artifacthub.io/"): text for name, text in about.items()}
    assert all(isinstance(text, str) for text in told.values())
    assert told["category"] == "ai-machine-learning"
    assert {told[name] for name in ("operator", "prerelease", "containsSecurityUpdates")} <= {
        "true",
        "false",
    }
    for change in chart.yaml.safe_load(told["changes"]):
        assert change["kind"] in {"added", "changed", "deprecated", "removed", "fixed", "security"}
    for name in ("links", "recommendations"):
        for link in chart.yaml.safe_load(told[name]):
            assert link["url"].startswith("https://")


def test_a_wrong_object_is_not_accepted():
    """The check itself: one unknown key in each kind of object is found."""
    seen = {}
    for name in chart.CI:
        for item in chart.render(chart.CI[name]).objects:
            seen.setdefault((item["apiVersion"], item["kind"]), item)
    assert len(seen) >= 15
    for item in seen.values():
        body = next(key for key in ("spec", "rules", "roleRef", "metadata") if key in item)
        broken = json.loads(json.dumps(item))
        target = broken[body][0] if isinstance(broken[body], list) else broken[body]
        target["surprise"] = 1
        assert chart.problems(broken, "1.33"), item["kind"]


def test_an_older_kubernetes_is_refused():
    with pytest.raises(chart.RefusedError, match=r"1\.29"):
        chart.render(chart.CI["minimal"], kubernetes="1.28")


@pytest.mark.parametrize("name", chart.CI)
def test_both_helms_write_the_same_twice(name):
    text = chart.CI[name].read_text()
    flags = [flag for api in chart.APIS for flag in ("--api-versions", api)]
    once, twice = (chart.template_once(text, flags, "4", "1.33") for _ in range(2))
    three = chart.template_once(text, flags, "3", "1.33")
    assert once == twice
    release = {json.dumps(item, sort_keys=True) for item in chart.Release(once).objects}
    assert {json.dumps(item, sort_keys=True) for item in chart.Release(three).objects} == release


def test_only_a_generated_key_differs_from_run_to_run():
    values = chart.merged(chart.ci_values("minimal"), {"auth": {"generate": True}})
    text = chart.yaml.dump(values)
    first, second = (chart.Release(chart.template_once(text, [], "4", "1.33")) for _ in range(2))
    assert first.one("Secret", "api-key")["data"] != second.one("Secret", "api-key")["data"]
    assert [item for item in first.objects if item["kind"] != "Secret"] == [
        item for item in second.objects if item["kind"] != "Secret"
    ]


@pytest.mark.parametrize("name", chart.CI)
def test_no_secret_is_rendered(name):
    values = chart.ci_values(name)
    release = chart.render(values)
    assert release.all("Secret") == []
    for where, pod in release.pods():
        spec = pod["spec"]
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            for variable in container.get("env", []):
                if re.search(r"(KEY|TOKEN|PASSWORD)$", variable["name"]):
                    assert set(variable) == {"name", "valueFrom"}, where
            for argument in [*container.get("command", []), *container.get("args", [])]:
                assert "key" not in argument.lower(), where


def test_the_minimal_example_is_short():
    assert len(chart.CI["minimal"].read_text().splitlines()) < 15


def test_object_names_stay_within_bounds():
    long = chart.merged(
        chart.ci_values("ray-2x8"), {"fullnameOverride": "a" * 63, "engine": {"replicas": 3}}
    )
    release = chart.render(long)
    for item in release.objects:
        assert len(item["metadata"]["name"]) <= 63
    # KubeRay's own bound
    assert max(len(item["metadata"]["name"]) for item in release.all("RayCluster")) <= 47


def test_large_numbers_are_written_as_numbers():
    # helm reads numbers as floating point, and would write 1e+09
    change = {
        "securityContext": {"runAsUser": 1000650000, "runAsGroup": 1000650000},
        "model": {"contextLength": 8388608},
        "engine": {"offload": {"hostGiB": 8192, "deviceTokens": 16777216}},
    }
    for name in ("offload", "ray-2x8"):
        values = chart.merged(chart.ci_values(name), change)
        values["engine"]["memory"]["limitGiB"] = 0
        assert "e+0" not in chart.render(values).text
