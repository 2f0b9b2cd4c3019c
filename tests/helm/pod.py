"""Starts what a rendered container would start, here: its command, arguments and environment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

# where a container finds its image's programs
IMAGE_PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
# all that may differ between a container and this machine
MOUNTS = ("/models", "/cache", "/kv", "/etc/hip-sglang/auth", "/etc/hip-sglang/test")
ADDRESS = "http://x-hip-sglang:80"


@dataclass
class Machine:
    """Folders in place of mounts, and addresses in place of Services."""

    root: Path
    services: Mapping[str, str] = field(default_factory=dict)

    def here(self, text: str) -> str:
        """The text with mounts and Services replaced; nothing else is."""
        for mount in MOUNTS:
            place = str(self.root / mount.strip("/"))
            if text == mount or text.startswith(f"{mount}/"):
                text = place + text.removeprefix(mount)
            # in JSON
            text = text.replace(f'"{mount}"', f'"{place}"')
        return self.services.get(text, text)

    def command(self, container: Mapping[str, Any]) -> list[str]:
        words: Sequence[str] = [*container.get("command", []), *container.get("args", [])]
        return [self.here(word) for word in words]

    def environment(self, container: Mapping[str, Any]) -> dict[str, str]:
        """The container's variables, and those of an image: nothing of ours comes in."""
        given = {item["name"]: item["value"] for item in container["env"] if "value" in item}
        return {"PATH": IMAGE_PATH, **{name: self.here(value) for name, value in given.items()}}

    def run(self, container: Mapping[str, Any], timeout: float) -> subprocess.CompletedProcess[str]:
        """A container that ends by itself."""
        return subprocess.run(
            self.command(container),
            env=self.environment(container),
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    @contextmanager
    def start(self, container: Mapping[str, Any], log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """A container that serves; its processes are gone afterwards."""
        with log.open("wb") as output:
            process = subprocess.Popen(
                self.command(container),
                env=self.environment(container),
                cwd=self.root,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def probe(container: Mapping[str, Any], name: str) -> bool:
    """What the kubelet does for an HTTP probe: any answer from 200 to 399 in time is good."""
    rendered = container[name]
    get = rendered["httpGet"]
    (port,) = (item["containerPort"] for item in container["ports"] if item["name"] == get["port"])
    try:
        answer = httpx.get(
            f"http://127.0.0.1:{port}{get['path']}", timeout=rendered["timeoutSeconds"]
        )
    except httpx.TransportError:
        return False
    return 200 <= answer.status_code < 400


def wait_until_started(container: Mapping[str, Any], process: subprocess.Popen[bytes]) -> float:
    """Seconds until the startup probe succeeds; raises when it has failed too often."""
    rendered, began = container["startupProbe"], time.monotonic()
    for _ in range(rendered["failureThreshold"]):
        if process.poll() is not None:
            raise ChildProcessError(f"it ended with code {process.returncode}")
        if probe(container, "startupProbe"):
            return time.monotonic() - began
        time.sleep(rendered["periodSeconds"])
    raise ChildProcessError("the startup probe failed too often")
