"""A server that drains: new requests are turned away, those that run go on."""

import asyncio

import httpx
import pytest

from hip_sglang.runtime.drain import RefuseWhileDraining


class Server:
    """The middleware around an application that answers everything."""

    def __init__(self):
        self.draining, self.seen = False, []
        self.app = RefuseWhileDraining(self.answer, lambda: self.draining)

    async def answer(self, scope, receive, send):
        body = b""
        while (message := await receive()).get("more_body"):
            body += message["body"]
        self.seen.append((scope["method"], scope["path"], len(body + message["body"])))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"answer"})

    def ask(self, method, path, **more):
        async def go():
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                return await client.request(method, path, **more)

        return asyncio.run(go())


@pytest.fixture
def server():
    return Server()


def test_a_server_that_serves_answers(server):
    assert server.ask("POST", "/generate", json={}).text == "answer"


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/generate"), ("PUT", "/generate"), ("POST", "/v1/chat/completions")],
)
def test_one_that_drains_turns_new_requests_away(server, method, path):
    server.draining = True
    answer = server.ask(method, path, json={"text": "x"})
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "5"
    assert answer.headers["Connection"] == "close"
    assert "shutting down" in answer.json()["message"]
    assert server.seen == []


def test_a_long_prompt_is_taken_in_before_it_is_refused(server):
    """A client that is still sending reads no answer."""
    sent = []

    async def prompt():
        for _ in range(100):
            sent.append(1)
            yield b"x" * 65536

    server.draining = True
    assert server.ask("POST", "/generate", content=prompt()).status_code == 503
    assert len(sent) == 100


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/metrics"),
        ("GET", "/health"),
        ("POST", "/abort_request"),
        ("POST", "/continue_generation"),
        ("POST", "/v1/responses/resp_1/cancel"),
    ],
)
def test_what_reads_or_ends_requests_is_welcome(server, method, path):
    server.draining = True
    assert server.ask(method, path).status_code == 200
    assert server.seen[0][:2] == (method, path)


def test_sglang_sets_the_stop_hook_before_it_listens(sglang):
    """Where the middleware comes in: in every way that one tokenizer's server can run."""
    import inspect

    from sglang.srt.entrypoints import http_server

    source = inspect.getsource(http_server._setup_and_run_http_server)
    one_tokenizer = source.split("# Multiple tokenizer and http processes.")[0]
    hook = "set_server_stop_hook("
    assert one_tokenizer.count(hook) == 2
    assert one_tokenizer.rindex(hook) < one_tokenizer.index("server.run()")
    assert hook in inspect.getsource(http_server._run_granian_server)
