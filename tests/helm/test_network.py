"""The network policies allow what the components need, and nothing else."""

from itertools import product

import pytest

from tests.helm import chart

COMPONENTS = ("engine", "router", "model", "test", "ranks", "head")
STRANGER = {"app": "stranger"}
CLIENT = {"app": "client"}
PROMETHEUS = {"app": "prometheus"}
PEERS = {
    "networkPolicy": {
        "clients": [{"podSelector": {"matchLabels": CLIENT}}],
        "prometheus": [{"podSelector": {"matchLabels": PROMETHEUS}}],
    }
}


def labels(component):
    return {
        "app.kubernetes.io/name": "hip-sglang",
        "app.kubernetes.io/instance": "x",
        "app.kubernetes.io/component": component,
    }


def selects(selector, pod):
    if not selector.get("matchLabels", {}).items() <= pod.items():
        return False
    return all(
        rule["operator"] == "In" and pod.get(rule["key"]) in rule["values"]
        for rule in selector.get("matchExpressions", [])
    )


def reached(rule, side, pod, port):
    """Whether one rule lets a pod of this namespace through, at a named or numbered port."""
    ports = {item["port"] for item in rule.get("ports", [])}
    peers = rule.get(side)
    near = not peers or any(selects(peer["podSelector"], pod) for peer in peers if peer)
    return near and (not ports or bool(ports & port))


def allowed(release, source, target, number, name=None):
    """Whether the policies let ``source`` open a connection to a port of ``target``."""
    port = {number} | ({name} if name else set())
    policies = [item["spec"] for item in release.all("NetworkPolicy")]
    outward = [p for p in policies if selects(p["podSelector"], source)]
    inward = [p for p in policies if selects(p["podSelector"], target)]
    leaves = not outward or any(
        reached(rule, "to", target, port) for p in outward for rule in p["egress"]
    )
    enters = not inward or any(
        reached(rule, "from", source, port) for p in inward for rule in p["ingress"]
    )
    return leaves and enters


def test_only_those_who_need_it_reach_the_engine():
    release = chart.render(chart.merged(chart.ci_values("minimal"), PEERS))
    engine = labels("engine")
    assert allowed(release, labels("router"), engine, 30000, "http")
    assert allowed(release, PROMETHEUS, engine, 30000, "http")
    for other in (STRANGER, CLIENT, labels("model"), labels("test"), engine):
        assert not allowed(release, other, engine, 30000, "http")


def test_the_router_is_reached_by_clients_and_tests():
    release = chart.render(chart.merged(chart.ci_values("minimal"), PEERS))
    router = labels("router")
    for who in (CLIENT, labels("test")):
        assert allowed(release, who, router, 8000, "http")
        assert not allowed(release, who, router, 29000, "metrics")
    assert allowed(release, PROMETHEUS, router, 29000, "metrics")
    assert not allowed(release, STRANGER, router, 8000, "http")


def test_everybody_is_a_client_where_none_is_named():
    release = chart.render(chart.CI["minimal"])
    assert allowed(release, STRANGER, labels("router"), 8000, "http")
    assert not allowed(release, STRANGER, labels("engine"), 30000, "http")


def test_without_a_router_clients_reach_the_engine():
    values = chart.merged(chart.ci_values("minimal"), {**PEERS, "router": {"enabled": False}})
    release = chart.render(values)
    assert allowed(release, CLIENT, labels("engine"), 30000, "http")
    assert not allowed(release, STRANGER, labels("engine"), 30000, "http")


def test_an_engine_calls_nobody():
    release = chart.render(chart.CI["minimal"])
    for target, port in product((STRANGER, labels("router")), (53, 443, 30000)):
        assert not allowed(release, labels("engine"), target, port)


def test_the_router_calls_engines_dns_and_the_api():
    release = chart.render(chart.CI["minimal"])
    for port in (53, 443, 6443):
        assert allowed(release, labels("router"), STRANGER, port)
    assert not allowed(release, labels("router"), STRANGER, 80)


def test_only_the_download_reaches_the_internet():
    release = chart.render(chart.CI["airgapped"])
    assert allowed(release, labels("model"), STRANGER, 443)
    assert not allowed(release, labels("model"), STRANGER, 80)
    assert not allowed(release, STRANGER, labels("model"), 443)
    assert not allowed(release, labels("engine"), STRANGER, 443)


def test_ray_talks_among_its_own_on_every_port():
    release = chart.render(chart.CI["ray-2x8"])
    own = ("engine", "ranks", "head")
    for source, target in product(own, own):
        for port in (6379, 8265, 10001, 45678):
            assert allowed(release, labels(source), labels(target), port)
    for port in (6379, 8265, 10001, 30000):
        for target in own:
            assert not allowed(release, STRANGER, labels(target), port)
    assert not allowed(release, labels("router"), labels("head"), 8265)


def test_prometheus_reaches_the_supervisor():
    release = chart.render(chart.merged(chart.ci_values("ray-2x8"), PEERS))
    assert allowed(release, PROMETHEUS, labels("head"), 8300, "metrics")
    assert not allowed(release, PROMETHEUS, labels("head"), 8265, "dashboard")
    assert not allowed(release, CLIENT, labels("head"), 8300, "metrics")


@pytest.mark.parametrize("name", chart.CI)
def test_every_pod_is_under_a_policy(name):
    release = chart.render(chart.CI[name])
    policies = [item["spec"]["podSelector"] for item in release.all("NetworkPolicy")]
    for where, pod in release.pods():
        if pod["metadata"]["labels"]["app.kubernetes.io/component"] == "test":
            continue
        assert any(selects(selector, pod["metadata"]["labels"]) for selector in policies), where


def flag(container, name):
    return int(container["args"][container["args"].index(name) + 1])


@pytest.mark.parametrize("name", ["minimal", "standalone", "cpu"])
def test_ports_are_what_the_programs_are_told_to_open(name):
    release = chart.render(chart.CI[name])
    (engine,) = release.one("Deployment", "engine")["spec"]["template"]["spec"]["containers"]
    (router,) = release.one("Deployment", "router")["spec"]["template"]["spec"]["containers"]
    assert engine["ports"] == [
        {"name": "http", "containerPort": flag(engine, "--port"), "protocol": "TCP"}
    ]
    assert {item["name"]: item["containerPort"] for item in router["ports"]} == {
        "http": flag(router, "--port"),
        "probes": flag(router, "--health-check-port"),
        "metrics": flag(router, "--prometheus-port"),
    }
    assert flag(router, "--service-discovery-port") == flag(engine, "--port")
    assert allowed(release, labels("router"), labels("engine"), flag(engine, "--port"), "http")


def test_ray_s_own_ports_are_those_of_ray():
    from ray._private import ray_constants

    release = chart.render(chart.CI["ray-2x8"])
    head = release.all("RayCluster")[0]["spec"]["headGroupSpec"]["template"]["spec"]
    ports = {item["name"]: item["containerPort"] for item in head["containers"][0]["ports"]}
    assert ports["gcs-server"] == ray_constants.DEFAULT_PORT
    assert ports["dashboard"] == ray_constants.DEFAULT_DASHBOARD_PORT
