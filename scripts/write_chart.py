"""Writes what the chart repeats: HipConfig's schema, its README, and the manifests in deploy/.

``--check`` writes nothing and fails where a file is stale; tests/helm/test_generated.py runs it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_tools
import yaml

from hip_sglang.config import HipConfig

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "helm" / "hip-sglang"
DEPLOY = ROOT / "deploy"
# the chart has a place of its own for it
OWN_PLACE = "offload"
# a file on the machine of whoever debugs
NOT_FOR_PODS = "trace"
MANIFESTS = {
    "kubernetes/standalone.yaml": "standalone",
    "kubernetes/ray-2x8.yaml": "ray-2x8",
    "kubernetes/cpu.yaml": "cpu",
}
APIS = ("ray.io/v1", "keda.sh/v1alpha1", "monitoring.coreos.com/v1")


def main(arguments: list[str]) -> int:
    helm_tools.fetch()
    stale = []
    for path, text in outputs():
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(str(path.relative_to(ROOT)))
        if arguments != ["--check"]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    for name in stale:
        print(f"{name}: {'stale; run `make chart`' if arguments == ['--check'] else 'written'}")
    return 1 if stale and arguments == ["--check"] else 0


def outputs() -> Iterator[tuple[Path, str]]:
    """Every generated file, and what it should hold."""
    yield CHART / "values.schema.json", schema()
    yield CHART / "README.md", readme()
    for name, values in MANIFESTS.items():
        yield DEPLOY / name, manifest(values)
    yield DEPLOY / "prometheus" / "alerts.yaml", alerts()


def schema() -> str:
    """The chart's schema with HipConfig's in it, in the draft that both helms read."""
    path = CHART / "values.schema.json"
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config = HipConfig.model_json_schema()
    for name in (OWN_PLACE, NOT_FOR_PODS):
        config["properties"].pop(name, None)
    nested = config.pop("$defs", {})
    values["$defs"]["hipConfig"] = config
    used = json.dumps(config)
    values["$defs"] |= {
        name: nested[name] for name in sorted(nested) if f'"#/$defs/{name}"' in used
    }
    return json.dumps(values, indent=2) + "\n"


def readme() -> str:
    """How to install, and the table of values, from the comments in values.yaml."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    lines = [(CHART / "README.head.md").read_text(encoding="utf-8").rstrip(), ""]
    lines += ["## Values", "", "| value | default | what it is |", "| --- | --- | --- |"]
    lines += [f"| `{path}` | {default} | {words} |" for path, default, words in described()]
    lines += [
        "",
        f"Written for version {chart['version']} by `make chart`; edit `values.yaml` instead.",
    ]
    return "\n".join(lines) + "\n"


def described() -> Iterator[tuple[str, str, str]]:
    """(path, default, comment) of every value that has a comment."""
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    defaults = yaml.safe_load(text)
    path: list[str] = []
    comment: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("# --"):
            comment = [stripped.removeprefix("# --").strip()]
        elif stripped.startswith("#") and comment:
            comment.append(stripped.removeprefix("#").strip())
        elif stripped and not stripped.startswith("#"):
            key = stripped.split(":", 1)[0]
            path = [*path[: (len(line) - len(line.lstrip())) // 2], key]
            if comment:
                value: Any = defaults
                for part in path:
                    value = value[part]
                yield (
                    ".".join(path),
                    f"`{json.dumps(value)}`",
                    " ".join(comment).replace("|", "\\|"),
                )
            comment = []


def manifest(values: str) -> str:
    """One example as plain manifests, for those who do not use helm."""
    command = [str(helm_tools.HELM["4"]), "template", "hip", str(CHART), "--namespace", "hip"]
    command += ["--kube-version", "1.33", "--no-hooks"]
    command += ["--values", str(CHART / "ci" / f"{values}-values.yaml")]
    for api in APIS:
        command += ["--api-versions", api]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    source = f"helm/hip-sglang/ci/{values}-values.yaml"
    return f"# written by `make chart` from {source}; use the chart to change it\n{text}"


def alerts() -> str:
    """The alert rules for a Prometheus without operator."""
    text = (CHART / "files" / "alerts.yaml").read_text(encoding="utf-8")
    head = "# written by `make chart`; every pod of every release\n"
    return head + text.replace("SERIES", 'job=~".*hip-sglang.*"')


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
