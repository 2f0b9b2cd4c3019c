"""The router before the replicas: smg, as a process of its own that ends with ours.

We start it, tell it who serves, and ask it what runs where; how requests are routed is its affair.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import httpx

from hip_cluster.ports import free_port
from hip_cluster.ray_cluster import ClusterError
from hip_cluster.spec import EndpointSpec
from hip_sglang.secret import Secret

KEY_VARIABLE = "HIP_SGLANG_ROUTER_KEY"
START_SECONDS = 60.0
# a dead replica: the first three failures of whoever comes open its circuit, a look a second
# closes it again, and who finds nobody gets 503 with Retry-After
ARGUMENTS = (
    *("--health-check-interval-secs", "1"),
    *("--health-failure-threshold", "1"),
    *("--health-success-threshold", "1"),
    *("--cb-failure-threshold", "3"),
    *("--cb-success-threshold", "1"),
    *("--cb-timeout-duration-secs", "2"),
    *("--worker-startup-check-interval", "1"),
    # one long context fills a replica that has few requests: KV counts, not requests alone
    *("--balance-token-usage-threshold", "0.3", "--overload-token-usage-threshold", "0.9"),
    *("--load-monitor-interval", "2"),
    # a document of a million tokens is kept to be sent once more, too
    *("--max-buffered-request-bytes", str(64 << 20)),
    # a line a request, with its id
    *("--log-level", "info", "--log-json"),
)


class RouterError(ClusterError):
    """The router did not do what it should; its message is one line."""


def main() -> None:
    """What the router's process runs: smg, with the key from its environment.

    Not by smg's own launcher: where that discovers workers it expects several models, and refuses
    what names none, as SGLang's frontend language does.
    """
    from smg.launch_router import parse_router_args
    from smg.router import Router as Smg

    arguments = parse_router_args(sys.argv[1:])
    arguments.api_key = os.environ.pop(KEY_VARIABLE, None)
    Smg.from_args(arguments).start()


def command(spec: EndpointSpec, metrics_port: int, workers: Iterable[str] = ()) -> list[str]:
    """The command line: smg's, or the one that the document gives.

    A router that is started again knows ``workers`` a moment sooner than it can be told of them.
    """
    server, router = spec.server, spec.router
    if router.command:
        names = {"host": server.host, "port": server.port, "policy": router.policy}
        return [*(word.format(**names) for word in router.command), *router.arguments]
    return [
        *(sys.executable, "-m", "hip_cluster.router"),
        *("--host", server.host, "--port", str(server.port), "--policy", router.policy),
        *("--prometheus-host", spec.supervisor.host, "--prometheus-port", str(metrics_port)),
        *ARGUMENTS,
        *(("--worker-urls", *workers) if (workers := sorted(workers)) else ()),
        *router.arguments,
    ]


class Router:
    """The running router.

    ``placeholder`` is a worker that never serves: with it registered, who finds no replica is told
    to come again, and not that there is no such model. It has to be healthy while the router gets
    to know it, and ``believed_in`` is told from when to when.
    """

    def __init__(
        self,
        spec: EndpointSpec,
        log: Path,
        api_key: Secret | None,
        placeholder: str,
        believed_in: Callable[[bool], None],
    ) -> None:
        self.metrics_port = free_port(spec.supervisor.host)
        self._spec, self._log, self._key = spec, log, api_key
        self._placeholder, self._believed_in = placeholder, believed_in
        self._process: asyncio.subprocess.Process | None = None
        self._workers: set[str] = set()
        self.admitted: set[str] = set()  # those that clients are sent to
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(spec.server.host, spec.server.host)
        headers = {"Authorization": f"Bearer {api_key!s}"} if api_key else {}
        self.url = f"http://{host}:{spec.server.port}"
        self._client = httpx.AsyncClient(base_url=self.url, headers=headers, timeout=10)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process and self._process.returncode is None else None

    async def start(self) -> None:
        """Start it, or start it again, and tell it of everybody. Raises RouterError."""
        line = command(self._spec, self.metrics_port, self._workers)
        environment = {**os.environ, **({KEY_VARIABLE: self._key} if self._key else {})}
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *line, stdout=log, stderr=log, env=environment, preexec_fn=_end_with_parent
            )
        try:
            await asyncio.wait_for(self._until_it_answers(line), START_SECONDS)
        except TimeoutError:
            raise RouterError(
                f"the router does not answer at {self.url}; see {self._log}"
            ) from None
        for url in self._workers:
            await self._post(url)
        await self._introduce_placeholder()

    async def wait(self) -> int:
        """Until the process ends; its exit code."""
        assert self._process is not None
        return await self._process.wait()

    async def stop(self) -> None:
        """End it: requests that run have ended or been given up by now."""
        await self._client.aclose()
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def admit(self, url: str) -> None:
        """Send clients to a replica; returns when they are sent. Raises httpx.HTTPError."""
        self._workers.add(url)
        await self._post(url)
        deadline = time.monotonic() + START_SECONDS
        while url in self._workers and time.monotonic() < deadline:
            if any(one["url"] == url and one["is_healthy"] for one in await self._list()):
                self.admitted.add(url)
                return
            await asyncio.sleep(0.05)

    async def dismiss(self, url: str) -> None:
        """Send no new request to it; those that run go on. Raises httpx.HTTPError."""
        self._workers.discard(url)
        self.admitted.discard(url)
        for worker in await self._list():
            if worker["url"] == url:
                answer = await self._client.delete(f"/workers/{worker['id']}")
                answer.raise_for_status()

    async def loads(self) -> Mapping[str, int]:
        """How many requests run on each replica, those included that were dismissed."""
        return {str(worker["url"]): int(str(worker["load"])) for worker in await self._list()}

    async def _introduce_placeholder(self) -> None:
        # it is healthy for as long as it takes to be believed in
        self._believed_in(False)
        deadline = time.monotonic() + START_SECONDS
        await self._post(self._placeholder)
        while self._placeholder not in await self.loads() and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self._believed_in(True)

    async def _list(self) -> list[dict[str, object]]:
        answer = (await self._client.get("/workers")).raise_for_status()
        workers: list[dict[str, object]] = answer.json()["workers"]
        return workers

    async def _post(self, url: str) -> None:
        body = {"url": url, **({"api_key": str(self._key)} if self._key else {})}
        answer = await self._client.post("/workers", json=body)
        # one that it knows already is welcome
        if answer.status_code not in (200, 201, 202, 409):
            answer.raise_for_status()

    async def _until_it_answers(self, line: list[str]) -> None:
        assert self._process is not None
        while True:
            if self._process.returncode is not None:
                raise RouterError(
                    f"the router `{shlex.join(line[:4])} ...` ended with code "
                    f"{self._process.returncode}; see {self._log}"
                )
            try:
                await self._client.get("/health")
                return
            except httpx.TransportError:
                await asyncio.sleep(0.1)


def _end_with_parent() -> None:
    # a supervisor that is killed cannot end anything
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    main()
