"""What stands before SGLang's server in its process, before an application that always answers."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from hip_cluster.door import Door


async def application(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["path"].encode()})


@pytest.mark.parametrize(
    ("path", "draining", "status", "fetched"),
    [
        ("/health", False, 200, 0),
        ("/health", True, 503, 0),
        ("/generate", True, 200, 0),
        ("/metrics", True, 200, 1),
    ],
)
def test_a_draining_server_is_unhealthy_and_answers(path, draining, status, fetched):
    scrapes = []

    async def ask():
        door = Door(application, lambda: draining, lambda: scrapes.append(path), set())
        transport = httpx.ASGITransport(door)
        async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
            return await client.get(path)

    answer = asyncio.run(ask())
    assert answer.status_code == status
    assert ("Retry-After" in answer.headers) == (status == 503)
    assert len(scrapes) == fetched


def test_what_was_posted_runs_until_it_is_answered_to_its_end():
    running, seen = set(), []

    async def failing(scope, receive, send):
        seen.append(len(running))
        raise ValueError("gone")

    async def ask():
        door = Door(failing, lambda: False, lambda: None, running)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(door)) as client:
            for method in ("POST", "GET"):
                with pytest.raises(ValueError, match="gone"):
                    await client.request(method, "http://door/generate")

    asyncio.run(ask())
    assert seen == [1, 0]
    assert not running
