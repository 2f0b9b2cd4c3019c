"""The queries of alerts, dashboard and autoscaling, and whether a real scrape answers them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.helm import chart

DASHBOARD = json.loads((chart.ROOT / "deploy/grafana/hip-sglang.json").read_text())
# labels that Prometheus adds
ADDED = {"namespace", "pod"}


def queries_of(release: chart.Release) -> dict[str, str]:
    """{where it stands: PromQL} of what a release renders, and of the dashboard."""
    rules = [
        rule
        for item in release.all("PrometheusRule")
        for rule in item["spec"]["groups"][0]["rules"]
    ]
    triggers = [
        trigger for item in release.all("ScaledObject") for trigger in item["spec"]["triggers"]
    ]
    found = {rule["alert"]: rule["expr"] for rule in rules}
    found |= {f"trigger {n}": t["metadata"]["query"] for n, t in enumerate(triggers)}
    return found | {
        f"panel {panel['title']} {target['refId']}": target["expr"]
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", [])
    }


def selectors(query: str) -> list[tuple[str, dict[str, str]]]:
    """(series, the labels that it must have) of each vector in a PromQL expression."""
    found = []
    for name, labels in re.findall(r"\b((?:sglang:|hip_|up\b)\w*)\{([^}]*)\}", query):
        wanted = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        found.append((name, {key: text for key, text in wanted.items() if key not in ADDED}))
    return found


def unanswered(queries: Mapping[str, str], scrapes: Iterable[str]) -> list[str]:
    """Vectors of which no scrape has a sample; ``up`` is Prometheus' own."""
    samples: dict[str, list[Sample]] = {}
    for text in scrapes:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples.setdefault(sample.name, []).append(sample)
    return [
        f"{where}: {name} {wanted}"
        for where, query in queries.items()
        for name, wanted in selectors(query)
        if name != "up"
        and not any(wanted.items() <= one.labels.items() for one in samples.get(name, []))
    ]
