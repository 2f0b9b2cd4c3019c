"""The supervisor's port: status, commands, metrics, readiness, and a worker of last resort."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from hip_cluster.fleet import Fleet
from hip_cluster.metrics import Metrics

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
# the worker of last resort
PLACEHOLDER = "/nobody"


class Control:
    """Answers on one port; what changes something wants the token."""

    def __init__(self, fleet: Fleet, metrics: Metrics, on_down: Callable[[], None]) -> None:
        self.token = secrets.token_hex(16)
        self._fleet, self._metrics, self._on_down = fleet, metrics, on_down
        self._restart: asyncio.Task[None] | None = None
        self.believed_in = True  # False while the router gets to know the worker of last resort
        app = web.Application(middlewares=[self._guard])
        app.add_routes(
            [
                web.get("/status", self._status),
                web.post("/scale", self._scale),
                web.post("/restart", self._restart_all),
                web.post("/drain", self._drain),
                web.post("/down", self._down),
                web.get("/health", self._health),
                web.get("/ready", self._ready),
                web.get("/metrics", self._scrape),
                web.route("*", PLACEHOLDER + "/{path:.*}", self._nobody),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None)

    async def start(self, host: str, port: int) -> str:
        """Listen; the URL. Raises OSError where the port is taken."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        await site.start()
        found: Any = self._runner.addresses[0]
        return f"http://{found[0]}:{found[1]}"

    async def stop(self) -> None:
        """Close the port."""
        await self._runner.cleanup()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method == "POST" and not request.path.startswith(PLACEHOLDER):
            given = request.headers.get("Authorization", "")
            if not secrets.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
                return web.json_response({"error": "wrong token"}, status=401)
        return await handler(request)

    async def _status(self, request: web.Request) -> web.Response:
        return web.json_response(status_of(self._fleet))

    async def _scale(self, request: web.Request) -> web.Response:
        count = (await request.json()).get("replicas")
        managed = self._fleet.spec.router.mode == "managed"
        if not isinstance(count, int) or not 0 < count <= (1024 if managed else 1):
            most = "from 1 to 1024" if managed else "1: more need router.mode managed"
            return web.json_response({"error": f"replicas must be {most}"}, status=400)
        self._fleet.scale(count)
        return web.json_response(status_of(self._fleet))

    async def _restart_all(self, request: web.Request) -> web.Response:
        if self._restart is not None and not self._restart.done():
            return web.json_response({"error": "a restart is under way"}, status=409)
        self._restart = asyncio.create_task(self._fleet.restart())
        return web.json_response(status_of(self._fleet))

    async def _drain(self, request: web.Request) -> web.Response:
        self._fleet.drain()
        return web.json_response(status_of(self._fleet))

    async def _down(self, request: web.Request) -> web.Response:
        self._on_down()
        return web.json_response(status_of(self._fleet))

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def _ready(self, request: web.Request) -> web.Response:
        ready = any(replica.ready for replica in self._fleet.replicas.values())
        return web.Response(status=200 if ready else 503, headers={"Retry-After": "5"})

    async def _scrape(self, request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.text(), content_type="text/plain")

    async def _nobody(self, request: web.Request) -> web.Response:
        """A worker that is known and never serves: see ``router.Router``."""
        model = self._fleet.spec.model.served_name or self._fleet.spec.model.path
        path = request.path.removeprefix(PLACEHOLDER)
        if path in ("/model_info", "/get_model_info", "/server_info", "/get_server_info"):
            return web.json_response({"model_path": model, "served_model_name": model})
        if path == "/v1/models":
            return web.json_response({"object": "list", "data": [{"id": model, "object": "model"}]})
        if path == "/health" and self.believed_in is False:
            return web.Response()
        return web.Response(status=503, headers={"Retry-After": "5"})


def status_of(fleet: Fleet) -> dict[str, Any]:
    """What `hip-cluster status` shows."""
    replicas = []
    for index, replica in sorted(fleet.replicas.items()):
        wires = [fleet.links.wires[m] for m in fleet.links.members(index, replica.attempt)]
        replicas.append(
            {
                "replica": index,
                "state": replica.state.value,
                "attempt": replica.attempt,
                "url": replica.url,
                "clients": replica.ready and fleet.has_clients(replica),
                "error": replica.error,
                "ranks": [
                    {
                        "name": wire.member.name,
                        "node": wire.node,
                        "pid": wire.pid,
                        "steps": wire.progress.steps,
                        "busy": wire.progress.busy,
                    }
                    for wire in sorted(wires, key=lambda wire: (wire.member.role, wire.member.rank))
                ],
            }
        )
    router = fleet.router
    return {
        "endpoint": fleet.spec.name,
        "wanted": fleet.wanted,
        "replicas": replicas,
        "router": {
            "mode": fleet.spec.router.mode,
            "url": None if router is None else router.url,
            "pid": None if router is None else router.pid,
        },
    }
