"""The real router before workers that answer like SGLang: who is sent where, and when nobody is."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time

import httpx
import psutil
import pytest
from aiohttp import web
from hip_cluster.control import Control
from hip_cluster.metrics import Metrics
from hip_cluster.ports import free_port
from hip_cluster.router import KEY_VARIABLE, Router, RouterError, command
from hip_cluster.spec import EndpointSpec

from hip_sglang.secret import Secret

KEY = Secret("the-key-of-the-router")


class Worker:
    """Answers ``/generate`` with its own name after ``pause`` seconds."""

    async def __aenter__(self):
        self.pause, self.ended = 0.0, 0
        app = web.Application()
        app.add_routes([web.post("/generate", self._generate), web.get("/{path:.*}", self._info)])
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *error):
        await self._runner.cleanup()

    async def _info(self, request):
        known = {"model_path": "/m", "served_model_name": "/m", "is_generation": True}
        if request.path == "/v1/models":
            known = {"object": "list", "data": [{"id": "/m", "object": "model"}]}
        return web.json_response(known)

    async def _generate(self, request):
        assert request.headers["Authorization"] == f"Bearer {KEY!s}"
        await asyncio.sleep(self.pause)
        self.ended += 1
        return web.json_response({"text": self.url})


class Nobody:
    """A fleet without replicas, for the supervisor's port."""

    def __init__(self, spec):
        self.spec, self.replicas = spec, {}


class Routed:
    """A router, the supervisor's port beside it, and a client with the key."""

    def __init__(self, folder, **router):
        self.spec = EndpointSpec.model_validate(
            {
                "name": "routed",
                "model": {"path": "/m"},
                "server": {"port": free_port("127.0.0.1")},
                "router": {"mode": "managed", **router},
            }
        )
        self._folder = folder

    async def __aenter__(self):
        self._control = Control(Nobody(self.spec), Metrics("routed"), lambda: None)
        url = await self._control.start("127.0.0.1", 0)
        self.router = Router(
            self.spec,
            self._folder / "router.log",
            KEY,
            url + "/nobody",
            lambda known: setattr(self._control, "believed_in", known),
        )
        await self.router.start()
        headers = {"Authorization": f"Bearer {KEY!s}"}
        self.client = httpx.AsyncClient(base_url=self.router.url, headers=headers, timeout=30)
        return self

    async def __aexit__(self, *error):
        await self.client.aclose()
        await self.router.stop()
        await self._control.stop()

    async def ask(self):
        return await self.client.post("/generate", json={"text": "x"})

    async def until_served(self):
        return await self.until(lambda answer: answer.status_code == 200)

    async def until(self, condition, seconds=20):
        deadline = time.monotonic() + seconds
        while not condition(answer := await self.ask()):
            assert time.monotonic() < deadline, answer.text
            await asyncio.sleep(0.05)
        return answer


def test_whoever_finds_no_replica_is_told_to_come_again(tmp_path):
    async def run():
        async with Routed(tmp_path) as routed:
            answer = await routed.until(lambda answer: answer.status_code == 503)
            assert answer.headers["Retry-After"]

    asyncio.run(run())


@pytest.mark.slow
def test_a_request_that_runs_outlives_the_dismissal_of_its_replica(tmp_path):
    async def run():
        async with Routed(tmp_path) as routed, Worker() as old, Worker() as new:
            await routed.router.admit(old.url)
            assert (await routed.until_served()).json() == {"text": old.url}
            old.pause = 3
            running = asyncio.create_task(routed.ask())
            await asyncio.sleep(1)
            assert (await routed.router.loads())[old.url] == 1
            await routed.router.admit(new.url)
            await routed.router.dismiss(old.url)
            assert (await routed.until_served()).json() == {"text": new.url}
            assert not running.done()
            assert (await running).json() == {"text": old.url}

    asyncio.run(run())


def test_what_a_dead_replica_did_not_begin_another_one_answers(tmp_path):
    async def run():
        async with Routed(tmp_path, policy="round_robin") as routed, Worker() as living:
            async with Worker() as dead:
                for worker in (living, dead):
                    await routed.router.admit(worker.url)
                await routed.until(lambda answer: answer.json().get("text") == dead.url)
            answers = [await routed.ask() for _ in range(20)]
            assert {answer.status_code for answer in answers} == {200}
            assert {answer.json()["text"] for answer in answers} == {living.url}

    asyncio.run(run())


def test_a_router_that_is_started_again_knows_everybody(tmp_path):
    async def run():
        async with Routed(tmp_path) as routed, Worker() as worker:
            await routed.router.admit(worker.url)
            await routed.until_served()
            os.kill(routed.router.pid, signal.SIGKILL)
            assert await routed.router.wait() == -signal.SIGKILL
            await routed.router.start()
            assert (await routed.until_served()).json() == {"text": worker.url}

    asyncio.run(run())


def test_the_key_is_asked_for_and_stands_nowhere(tmp_path):
    async def run():
        async with Routed(tmp_path) as routed, Worker() as worker:
            await routed.router.admit(worker.url)
            await routed.until_served()
            async with httpx.AsyncClient(base_url=routed.router.url) as stranger:
                for path in ("/generate", "/workers"):
                    answer = await stranger.post(path, json={"text": "x", "url": "http://evil"})
                    assert answer.status_code == 401
            process = psutil.Process(routed.router.pid)
            assert KEY not in " ".join(process.cmdline())
            assert KEY not in (tmp_path / "router.log").read_text()

    asyncio.run(run())


def test_a_router_that_finds_replicas_by_itself_takes_requests_that_name_no_model(tmp_path):
    """As the chart's does: smg would route by model then, and turn these away."""

    async def run():
        async with Worker() as worker:
            manifest, port = tmp_path / "workers.json", free_port("127.0.0.1")
            manifest.write_text(json.dumps({"version": 1, "workers": [{"url": worker.url}]}))
            line = [sys.executable, "-m", "hip_cluster.router", "--port", str(port)]
            line += ["--prometheus-port", str(free_port("127.0.0.1"))]
            line += ["--discovery-provider", "file", "--discovery-file", str(manifest)]
            environment = {**os.environ, KEY_VARIABLE: KEY}
            process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL)
            try:
                assert await first_answer(f"http://127.0.0.1:{port}") == {"text": worker.url}
            finally:
                process.kill()
                process.wait()

    async def first_answer(url, seconds=30):
        deadline, headers = time.monotonic() + seconds, {"Authorization": f"Bearer {KEY!s}"}
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=30) as http:
            while time.monotonic() < deadline:
                try:
                    answer = await http.post("/generate", json={"text": "x"})
                    if answer.status_code == 200:
                        return answer.json()
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.05)
        return answer.text

    asyncio.run(run())


def test_another_router_can_take_its_place(tmp_path):
    spec = EndpointSpec.model_validate(
        {
            "name": "routed",
            "model": {"path": "/m"},
            "router": {"mode": "managed", "command": ["mine", "--at={host}:{port}"]},
        }
    )
    assert command(spec, 1) == ["mine", "--at=127.0.0.1:30000"]


def test_a_router_that_ends_at_once_is_told_in_one_line(tmp_path):
    async def run():
        with pytest.raises(RouterError, match="ended with code 1"):
            await Routed(tmp_path, command=["false"]).__aenter__()

    asyncio.run(run())
