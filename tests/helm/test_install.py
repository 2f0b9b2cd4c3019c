"""The chart on a real API server: install, upgrade, rollback, uninstall, and what roles allow."""

import base64
import json
import re
import shutil
import subprocess

import pytest

from tests.helm import chart

pytestmark = [pytest.mark.soak, pytest.mark.kubernetes, pytest.mark.timeout(900)]

# Kubernetes 1.20 has neither budgets nor autoscalers in the versions that the chart renders
OLD_SERVER = {"podDisruptionBudget": {"enabled": False}}
HELM = sorted(chart.tools.HELM)


def values_of(name, *changes):
    values = chart.merged(chart.ci_values(name), OLD_SERVER)
    for change in changes:
        values = chart.merged(values, change)
    return values


@pytest.fixture
def namespace(kubernetes, request):
    """A new namespace, with the service account that a controller would make."""
    name = re.sub("[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[-60:].strip("-")
    kubernetes.kubectl("create", "namespace", name)
    return name


def template_of(kubernetes, namespace, name="x-hip-sglang-engine"):
    return kubernetes.one(namespace, "deployment", name)["spec"]["template"]


@pytest.mark.parametrize("helm", HELM)
@pytest.mark.parametrize("name", chart.CI)
def test_every_example_installs_and_leaves_nothing(kubernetes, namespace, name, helm):
    before = kubernetes.everything(namespace)

    def helm_does(*words, **more):
        return kubernetes.helm(*words, namespace=namespace, version=helm, **more)

    helm_does("install", "x", str(chart.CHART), values=values_of(name))
    there = kubernetes.everything(namespace) - before
    manifest = chart.Release(helm_does("get", "manifest", "x"))
    assert {item["metadata"]["name"] for item in manifest.objects} <= {
        one.split("/")[1] for one in there
    }
    helm_does("uninstall", "x")
    left = kubernetes.everything(namespace) - before
    # what took hours to download stays, and is said to
    kept = {"persistentvolumeclaim/x-hip-sglang-model"} if name == "airgapped" else set()
    assert left == kept
    if kept:
        helm_does("install", "x", str(chart.CHART), values=values_of(name))


@pytest.mark.parametrize("helm", HELM)
class TestOneRelease:
    """Each with a release of its own."""

    @pytest.fixture
    def helm_does(self, kubernetes, namespace, helm):
        def helm_does(*words, **more):
            return kubernetes.helm(*words, namespace=namespace, version=helm, **more)

        helm_does("install", "x", str(chart.CHART), values=values_of("standalone"))
        return helm_does

    def test_an_upgrade_rolls_pods_and_keeps_selectors(self, kubernetes, namespace, helm_does):
        old = kubernetes.one(namespace, "deployment", "x-hip-sglang-engine")
        change = {"image": {"tag": "2"}, "engine": {"hipConfig": {"budget": 8192}}}
        helm_does("upgrade", "x", str(chart.CHART), values=values_of("standalone", change))
        new = kubernetes.one(namespace, "deployment", "x-hip-sglang-engine")
        assert new["metadata"]["uid"] == old["metadata"]["uid"]
        assert new["metadata"]["generation"] > old["metadata"]["generation"]
        assert new["spec"]["selector"] == old["spec"]["selector"]
        (container,) = new["spec"]["template"]["spec"]["containers"]
        assert container["image"].endswith(":2")
        assert any('"budget":8192' in word for word in container["args"])

    def test_an_upgrade_that_changes_nothing_rolls_nothing(self, kubernetes, namespace, helm_does):
        old = kubernetes.one(namespace, "deployment", "x-hip-sglang-engine")
        helm_does("upgrade", "x", str(chart.CHART), values=values_of("standalone"))
        new = kubernetes.one(namespace, "deployment", "x-hip-sglang-engine")
        assert new["metadata"]["generation"] == old["metadata"]["generation"]

    def test_a_new_chart_upgrades_what_an_old_one_installed(
        self, kubernetes, namespace, helm_does, tmp_path
    ):
        """Labels change with the chart's version; the API refuses other selectors."""
        newer = tmp_path / "hip-sglang"
        shutil.copytree(chart.CHART, newer)
        text = (newer / "Chart.yaml").read_text()
        (newer / "Chart.yaml").write_text(
            re.sub(r"(?m)^(version|appVersion): .*", r"\1: 9.9.9", text)
        )
        helm_does("upgrade", "x", str(newer), values=values_of("standalone"))
        template = template_of(kubernetes, namespace)
        assert template["metadata"]["labels"]["helm.sh/chart"] == "hip-sglang-9.9.9"

    def test_a_rollback_brings_the_first_pods_back(self, kubernetes, namespace, helm_does):
        first = template_of(kubernetes, namespace)
        change = {"model": {"contextLength": 65536}, "router": {"enabled": False}}
        helm_does("upgrade", "x", str(chart.CHART), values=values_of("standalone", change))
        assert template_of(kubernetes, namespace) != first
        assert "deployment.apps/x-hip-sglang-router" not in kubernetes.everything(namespace)
        helm_does("rollback", "x", "1")
        assert template_of(kubernetes, namespace) == first
        assert "deployment.apps/x-hip-sglang-router" in kubernetes.everything(namespace)


@pytest.mark.parametrize("helm", HELM)
def test_a_generated_key_is_kept_until_the_release_goes(kubernetes, namespace, helm):
    def helm_does(*words, **more):
        return kubernetes.helm(*words, namespace=namespace, version=helm, **more)

    def key():
        data = kubernetes.one(namespace, "secret", "x-hip-sglang-api-key")["data"]["api-key"]
        return base64.b64decode(data).decode()

    change = {"auth": {"existingSecret": "", "generate": True}}
    helm_does("install", "x", str(chart.CHART), values=values_of("standalone", change))
    first = key()
    assert len(first) == 40
    other = {"image": {"tag": "2"}}
    helm_does("upgrade", "x", str(chart.CHART), values=values_of("standalone", change, other))
    assert key() == first
    helm_does("rollback", "x", "1")
    assert key() == first
    helm_does("uninstall", "x")
    assert "secret/x-hip-sglang-api-key" not in kubernetes.everything(namespace)


@pytest.mark.parametrize("helm", HELM)
def test_another_model_is_another_job(kubernetes, namespace, helm):
    """A Job cannot be changed: the API would refuse the upgrade."""

    def helm_does(*words, **more):
        return kubernetes.helm(*words, namespace=namespace, version=helm, **more)

    def jobs():
        return {one for one in kubernetes.everything(namespace) if one.startswith("job")}

    helm_does("install", "x", str(chart.CHART), values=values_of("airgapped"))
    first = jobs()
    other = {"model": {"download": {"revision": "0" * 40}}}
    helm_does("upgrade", "x", str(chart.CHART), values=values_of("airgapped", other))
    assert len(jobs()) == 1
    assert jobs() != first


def test_the_router_may_see_pods_of_its_namespace_and_nobody_else_anything(kubernetes, namespace):
    kubernetes.helm(
        "install", "x", str(chart.CHART), namespace=namespace, values=values_of("minimal")
    )
    allowed = {
        account: permissions(kubernetes, namespace, f"x-hip-sglang{account}")
        for account in ("", "-router")
    }
    assert allowed[""] == set()
    assert allowed["-router"] == {("get", "pods"), ("list", "pods"), ("watch", "pods")}
    token = kubernetes.kubeconfig(kubernetes.token(namespace, "x-hip-sglang-router"))
    assert kubernetes.kubectl("--namespace", namespace, "get", "pods", config=token) == ""
    for words in (("secrets",), ("pods", "--all-namespaces")):
        with pytest.raises(subprocess.CalledProcessError) as refused:
            kubernetes.kubectl("--namespace", namespace, "get", *words, config=token)
        assert "forbidden" in refused.value.stderr.lower()


def permissions(kubernetes, namespace, account):
    """(verb, resource) of all that a service account may do to objects of its namespace."""
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": namespace},
    }
    token = kubernetes.kubeconfig(kubernetes.token(namespace, account))
    words = ["create", "--filename", "-", "--output", "json"]
    answer = json.loads(kubernetes.kubectl(*words, text=json.dumps(review), config=token))
    return {
        (verb, resource)
        for rule in answer["status"]["resourceRules"]
        for verb in rule["verbs"]
        for resource in rule["resources"]
        # what everybody may: ask what they may
        if not resource.startswith("selfsubject")
    }
