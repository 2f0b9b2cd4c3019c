"""Runs the real helm on the chart, and reads what it renders."""

from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from jsonschema import Draft202012Validator

ROOT = Path(__file__).resolve().parent.parent.parent
CHART = ROOT / "helm" / "hip-sglang"
CI = {path.name.removesuffix("-values.yaml"): path for path in sorted(CHART.glob("ci/*.yaml"))}
# what a cluster with every operator answers
APIS = (
    "ray.io/v1",
    "keda.sh/v1alpha1",
    "monitoring.coreos.com/v1",
    "gateway.networking.k8s.io/v1",
    "custom.metrics.k8s.io/v1beta1",
)


def script(name: str) -> ModuleType:
    """One of scripts/, which are no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # they import each other by their names
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


tools = script("helm_tools")

Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class RefusedError(Exception):
    """helm ended with an error; its text is the message."""


@dataclass(frozen=True)
class Release:
    """One rendered release."""

    text: str

    @property
    def objects(self) -> list[dict[str, Any]]:
        return [item for item in yaml.load_all(self.text, Loader=Loader) if item]

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [item for item in self.objects if item["kind"] == kind]

    def one(self, kind: str, suffix: str = "") -> dict[str, Any]:
        """The object of a kind whose name ends so, after the release's own."""
        name = f"x-hip-sglang{suffix and '-'}{suffix}"
        (found,) = (item for item in self.all(kind) if item["metadata"]["name"] == name)
        return found

    def pods(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every pod template, as (where it stands, the template)."""
        for item in self.objects:
            name = f"{item['kind']}/{item['metadata']['name']}"
            if item["kind"] == "Pod":
                yield name, item
            elif item["kind"] in ("Deployment", "Job"):
                yield name, item["spec"]["template"]
            elif item["kind"] == "RayCluster":
                yield f"{name}/head", item["spec"]["headGroupSpec"]["template"]
                for group in item["spec"]["workerGroupSpecs"]:
                    yield f"{name}/{group['groupName']}", group["template"]


def run(*arguments: str, helm: str = "4") -> str:
    """One helm command; raises RefusedError."""
    result = subprocess.run(
        [str(tools.HELM[helm]), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if result.returncode != 0:
        raise RefusedError(result.stderr + result.stdout)
    return result.stdout


def render(
    values: Mapping[str, Any] | Path,
    *more: str,
    helm: str = "4",
    kubernetes: str = "1.33",
    apis: Sequence[str] = APIS,
) -> Release:
    """``helm template`` of release ``x`` in namespace ``ns``."""
    flags = [flag for api in apis for flag in ("--api-versions", api)]
    return Release(_template(_values_text(values), (*flags, *more), helm, kubernetes))


def _values_text(values: Mapping[str, Any] | Path) -> str:
    if isinstance(values, Path):
        return values.read_text(encoding="utf-8")
    return yaml.dump(dict(values), Dumper=Dumper)


@cache
def _template(values: str, flags: tuple[str, ...], helm: str, kubernetes: str) -> str:
    return template_once(values, flags, helm, kubernetes)


def template_once(values: str, flags: Sequence[str], helm: str, kubernetes: str) -> str:
    """The text that helm writes, not remembered."""
    command = [str(tools.HELM[helm]), "template", "x", str(CHART), "--namespace", "ns"]
    command += ["--kube-version", kubernetes, "--values", "-", *flags]
    result = subprocess.run(
        command, input=values, capture_output=True, text=True, timeout=120, check=False
    )
    if result.returncode != 0:
        raise RefusedError(result.stderr)
    return result.stdout


def ci_values(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.load(CI[name].read_text(encoding="utf-8"), Loader=Loader)
    return values


def merged(values: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Values with others over them, as helm merges files."""
    result = dict(values)
    for key, value in change.items():
        below = result.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = merged(below, value)
        result[key] = value
    return result


def at(path: str, value: Any) -> dict[str, Any]:
    """``at("a.b", 1)`` is ``{"a": {"b": 1}}``."""
    for key in reversed(path.split(".")):
        value = {key: value}
    nested: dict[str, Any] = value
    return nested


@cache
def definitions(kubernetes: str) -> dict[str, Any]:
    """Kubernetes' own strict schema of one version, and those of the custom resources."""
    text = gzip.decompress(tools.schema_file(kubernetes).read_bytes())
    schema: dict[str, Any] = json.loads(text)["$defs"]
    custom = yaml.load((Path(__file__).parent / "custom_resources.yaml").read_text(), Loader=Loader)
    for resource in custom:
        group, _, version = resource["group"].partition("/")
        schema[f"{group}.{version}.{resource['kind']}"] = {
            "type": "object",
            "additionalProperties": False,
            "required": ["apiVersion", "kind", "metadata", "spec"],
            "properties": {
                "apiVersion": {"const": resource["group"]},
                "kind": {"const": resource["kind"]},
                "metadata": {"$ref": "#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"},
                "spec": strict(resource["spec"]),
            },
            "x-kubernetes-group-version-kind": [
                {"group": group, "version": version, "kind": resource["kind"]}
            ],
        }
    return schema


def strict(schema: Any) -> Any:
    """The schema with unknown keys refused wherever keys are named."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict):
        result = {"type": "object", "additionalProperties": False, **result}
    return result


@cache
def validator(kubernetes: str, api_version: str, kind: str) -> Draft202012Validator:
    """Raises KeyError for a kind that this version does not have."""
    group, _, version = api_version.rpartition("/")
    wanted = {"group": group, "version": version, "kind": kind}
    schema = definitions(kubernetes)
    for name, definition in schema.items():
        if wanted in definition.get("x-kubernetes-group-version-kind", []):
            return Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": schema})
    raise KeyError(f"Kubernetes {kubernetes} has no {api_version} {kind}")


@cache
def _problems(kubernetes: str, text: str) -> tuple[str, ...]:
    item = json.loads(text)
    name = f"{item['kind']}/{item['metadata']['name']}"
    errors = validator(kubernetes, item["apiVersion"], item["kind"]).iter_errors(item)
    return tuple(
        f"{name}: {'.'.join(map(str, error.path))}: {error.message[:200]}" for error in errors
    )


def problems(item: Mapping[str, Any], kubernetes: str) -> tuple[str, ...]:
    """What the API of one version would not accept in an object."""
    return _problems(kubernetes, json.dumps(item, sort_keys=True))
