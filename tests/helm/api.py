"""A real kube-apiserver and etcd of this machine: Role-based access on, no controllers, no nodes.

What a controller would do stays undone (a Deployment has no pods), so tests create a pod from a
Deployment's own template, and set its status as a kubelet would.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.helm import chart

server = chart.script("kube_apiserver")
START_SECONDS = 120


@dataclass(frozen=True)
class Api:
    """The door to it: kubectl and helm, as an administrator or as a service account."""

    root: Path
    url: str

    def kubeconfig(self, token: str, namespace: str = "default") -> Path:
        """A file that lets programs in with a bearer token."""
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {
                    "name": "here",
                    "cluster": {
                        "server": self.url,
                        "certificate-authority": str(self.root / "certificates/apiserver.crt"),
                    },
                }
            ],
            "users": [{"name": "me", "user": {"token": token}}],
            "contexts": [
                {
                    "name": "here",
                    "context": {"cluster": "here", "user": "me", "namespace": namespace},
                }
            ],
            "current-context": "here",
        }
        path = self.root / f"{secrets.token_hex(4)}.kubeconfig"
        path.write_text(yaml.safe_dump(content))
        return path

    @property
    def administrator(self) -> Path:
        return self.root / "administrator.kubeconfig"

    def kubectl(self, *words: str, text: str = "", config: Path | None = None) -> str:
        """One command; raises CalledProcessError, whose stderr says what is wrong."""
        command = [str(chart.tools.KUBECTL), "--kubeconfig", str(config or self.administrator)]
        return subprocess.run(
            [*command, *words], input=text, capture_output=True, text=True, timeout=120, check=True
        ).stdout

    def objects(self, *words: str) -> list[dict[str, Any]]:
        """What ``kubectl get`` finds."""
        found = json.loads(self.kubectl("get", *words, "--output", "json"))
        items: list[dict[str, Any]] = found.get("items", [found])
        return items

    def one(self, namespace: str, kind: str, name: str) -> dict[str, Any]:
        (found,) = self.objects("--namespace", namespace, kind, name)
        return found

    def everything(self, namespace: str) -> set[str]:
        """kind/name of all that the namespace holds, but for the API's own."""
        words = ["api-resources", "--namespaced", "--verbs=list,create", "--output=name"]
        kinds = set(self.kubectl(*words).split()) - {"events", "events.events.k8s.io"}
        words = ["--namespace", namespace, "--output=name", "--ignore-not-found"]
        return set(self.kubectl("get", ",".join(sorted(kinds)), *words).split())

    def helm(
        self,
        *words: str,
        namespace: str,
        version: str = "4",
        values: Mapping[str, Any] | None = None,
    ) -> str:
        """One helm command; raises chart.RefusedError."""
        flags = ["--kubeconfig", str(self.administrator), "--namespace", namespace]
        if values is not None:
            file = self.root / f"{secrets.token_hex(4)}.yaml"
            file.write_text(yaml.safe_dump(dict(values)))
            flags += ["--values", str(file)]
        return chart.run(*words, *flags, helm=version)

    def token(self, namespace: str, account: str) -> str:
        """A token of a service account, as the kubelet puts it into a pod."""
        return self.kubectl("--namespace", namespace, "create", "token", account).strip()

    def start_pod(self, namespace: str, name: str, template: Mapping[str, Any]) -> None:
        """Create a pod from a template; it is ready at 127.0.0.1, as a kubelet would say."""
        labels = template["metadata"]["labels"]
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": namespace, "labels": labels},
            # a pod of a node stays until its kubelet has ended it
            "spec": {**template["spec"], "nodeName": "here"},
        }
        self.kubectl("create", "--filename", "-", text=json.dumps(pod))
        self.set_ready(namespace, name, ready=True)

    def set_ready(self, namespace: str, name: str, *, ready: bool) -> None:
        """What a kubelet reports after a readiness probe."""
        conditions = [{"type": kind, "status": str(ready)} for kind in ("Ready", "ContainersReady")]
        status = {
            "phase": "Running",
            "podIP": "127.0.0.1",
            "podIPs": [{"ip": "127.0.0.1"}],
            "conditions": conditions,
        }
        patch = ["--subresource=status", "--type=merge", "--patch", json.dumps({"status": status})]
        self.kubectl("--namespace", namespace, "patch", "pod", name, *patch)


@contextmanager
def running(root: Path) -> Iterator[Api]:
    """The API of a new, empty cluster; gone afterwards."""
    port, client, peer = free_ports(3)
    key, tokens = root / "accounts.key", root / "tokens.csv"
    subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
    secret = secrets.token_hex(16)
    tokens.write_text(f'{secret},administrator,1,"system:masters"\n')
    etcd = f"http://127.0.0.1:{client}"
    store = [str(server.ETCD), "--data-dir", str(root / "etcd")]
    store += ["--listen-client-urls", etcd, "--advertise-client-urls", etcd]
    store += ["--listen-peer-urls", f"http://127.0.0.1:{peer}"]
    flags = {
        "etcd-servers": etcd,
        "bind-address": "127.0.0.1",
        "advertise-address": "127.0.0.1",
        "secure-port": port,
        "cert-dir": root / "certificates",
        "service-cluster-ip-range": "10.96.0.0/16",
        "service-account-issuer": "https://kubernetes.default.svc",
        "service-account-signing-key-file": key,
        "service-account-key-file": key,
        "authorization-mode": "RBAC",
        "token-auth-file": tokens,
        # they write beta APIs, which a server that calls itself newer has no more
        "feature-gates": "APIPriorityAndFairness=false",
        "endpoint-reconciler-type": "none",
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    with ExitStack() as stack:
        stack.enter_context(process(store, root / "etcd.log"))
        log = root / "kube-apiserver.log"
        api = stack.enter_context(process([str(server.API_SERVER), *words], log))
        cluster = Api(root, f"https://127.0.0.1:{port}")
        cluster.kubeconfig(secret).rename(cluster.administrator)
        deadline = time.monotonic() + START_SECONDS
        while not is_ready(cluster):
            assert api.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.5)
        yield cluster


def is_ready(cluster: Api) -> bool:
    try:
        return cluster.kubectl("get", "--raw", "/readyz") == "ok"
    except subprocess.CalledProcessError:
        return False


@contextmanager
def process(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        started = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={"PATH": os.environ["PATH"]}
        )
    try:
        yield started
    finally:
        started.kill()
        started.wait()


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def define(cluster: Api) -> None:
    """Custom resources of the operators that the chart knows; what is in them others check."""
    text = (Path(__file__).parent / "custom_resources.yaml").read_text()
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    definitions = []
    for resource in yaml.safe_load(text):
        group, _, version = resource["group"].partition("/")
        plural = f"{resource['kind'].lower()}s"
        definitions.append(
            {
                "apiVersion": "apiextensions.k8s.io/v1",
                "kind": "CustomResourceDefinition",
                "metadata": {
                    "name": f"{plural}.{group}",
                    "annotations": {"api-approved.kubernetes.io": "https://example.com"},
                },
                "spec": {
                    "group": group,
                    "scope": "Namespaced",
                    "names": {"kind": resource["kind"], "plural": plural},
                    "versions": [
                        {
                            "name": version,
                            "served": True,
                            "storage": True,
                            "schema": {"openAPIV3Schema": anything},
                        }
                    ],
                },
            }
        )
    bundle = {"apiVersion": "v1", "kind": "List", "items": definitions}
    cluster.kubectl("create", "--filename", "-", text=json.dumps(bundle))
    words = ["wait", "--for=condition=Established", "crd", "--all", "--timeout=60s"]
    cluster.kubectl(*words)
