"""What lies in deploy/: images, documents, alerts, the dashboard."""

import os
import re
import shutil
import subprocess
import sys
import venv

import pytest
from hip_cluster.spec import EndpointSpec

from tests.helm import chart
from tests.helm.queries import DASHBOARD, selectors

DEPLOY = chart.ROOT / "deploy"
DOCKERFILES = sorted((DEPLOY / "docker").iterdir())
LOCK = (chart.ROOT / "requirements" / "lock.txt").read_text()
SETUP = (chart.ROOT / "scripts" / "setup.sh").read_text()
ALERTS = chart.yaml.safe_load((chart.CHART / "files" / "alerts.yaml").read_text())
RULES = ALERTS["groups"][0]["rules"]


def steps(dockerfile):
    """The instructions of the last stage, each on one line."""
    text = re.sub(r"\\\n\s*(#[^\n]*\n\s*)*", " ", dockerfile.read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    last = max(n for n, line in enumerate(lines) if line.startswith("FROM"))
    return lines[last:]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_the_linter_finds_nothing(dockerfile):
    result = subprocess.run(
        [str(chart.tools.HADOLINT), "--failure-threshold", "warning", str(dockerfile)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_images_run_as_nobody_special_and_keep_no_secret(dockerfile):
    lines = steps(dockerfile)
    users = [line for line in lines if line.startswith("USER")]
    assert users == ["USER 1000:1000"]
    # bases by argument, so that a build can name digests
    assert lines[0].startswith("FROM ${")
    for line in lines:
        if line.startswith(("ARG", "ENV")):
            assert not re.search("KEY|TOKEN|SECRET|PASSWORD", line)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_versions_are_those_of_the_set_up(dockerfile):
    text = dockerfile.read_text()
    for name, version in re.findall(r"\b([a-z]+)==([0-9.]+)", text):
        assert f"\n{name}=={version}\n" in LOCK or f"\n{name}={version}\n" in SETUP, name
    sglang = re.search(r"sglang=([0-9.]+)", SETUP)[1]
    assert f"sglang:v{sglang}" in text or f"sglang=={sglang}" in text
    if "RAY_VERSION" in text:
        ray = re.search(r"\nray==([0-9.]+)\n", LOCK)[1]
        assert f"RAY_VERSION={ray}" in text
        values = chart.yaml.safe_load((chart.CHART / "values.yaml").read_text())
        assert values["ray"]["version"] == ray


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_cpu_image_s_install_lines_work_in_a_fresh_environment(tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    shutil.copytree(chart.ROOT / "requirements", tmp_path / "requirements")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel"]
    subprocess.run([*command, "-d", str(tmp_path / "dist")], cwd=chart.ROOT, check=True)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'venv' / 'bin'}:{os.environ['PATH']}",
    }
    runs = [line.removeprefix("RUN ") for line in steps(DEPLOY / "docker" / "Dockerfile.cpu")]
    for line in runs:
        if line.startswith(("python3 -m pip", "hip-sglang --version")):
            # a machine's own cache is what an image does without
            line = line.replace("--no-cache-dir", "")
            subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, check=True)


@pytest.mark.parametrize("path", sorted((DEPLOY / "ray").glob("*.yaml")), ids=lambda p: p.name)
def test_documents_for_ray_are_endpoints(path):
    assert EndpointSpec.load(path).name == {"endpoint": "llama", "local": "local"}[path.stem]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_alert_has_a_runbook(rule):
    operations = (chart.ROOT / "docs" / "operations.md").read_text()
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert page == "docs/operations.md"
    headings = re.findall(r"^#+ (.+)$", operations, re.MULTILINE)
    assert anchor in {heading.lower().replace(" ", "-") for heading in headings}
    assert rule["alert"].lower() == anchor


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus)")
def test_promtool_accepts_alerts_and_queries(tmp_path):
    """The alerts as they are; queries of dashboard and autoscaling as rules of their own."""
    queries = [t["expr"] for panel in DASHBOARD["panels"] for t in panel["targets"]]
    scaled = chart.render(chart.CI["standalone"]).all("ScaledObject")[0]["spec"]["triggers"]
    queries += [trigger["metadata"]["query"] for trigger in scaled]
    rules = [{"record": f"query:{n}", "expr": query} for n, query in enumerate(queries)]
    file = tmp_path / "queries.yaml"
    file.write_text(chart.yaml.dump({"groups": [{"name": "queries", "rules": rules}]}))
    command = ["promtool", "check", "rules", str(DEPLOY / "prometheus" / "alerts.yaml"), str(file)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_dashboard_shows_what_was_asked_for():
    titles = {panel["title"] for panel in DASHBOARD["panels"]}
    assert {"Density", "Prefix hits", "Occupancy", "Queue", "Recoveries"} <= titles
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            assert selectors(target["expr"]), panel["title"]
            assert "$namespace" in target["expr"]


def test_plain_manifests_are_what_the_api_accepts():
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
        for item in chart.Release(path.read_text()).objects:
            assert chart.problems(item, "1.33") == (), path.name
