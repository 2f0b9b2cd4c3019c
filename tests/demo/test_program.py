"""The frontend program, against a stand-in for the server that records what it is asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from hip_sglang.demo import program
from hip_sglang.demo.corpus import Document
from hip_sglang.demo.program import ask, measure_speed
from hip_sglang.demo.quotes import Quote, pick_quotes
from hip_sglang.demo.vocabulary import Tokenizer

# a frontend thread says so when a request fails, maybe after its test
pytestmark = pytest.mark.filterwarnings("ignore:Error in stream_executor")


class StandIn(ThreadingHTTPServer):
    """Continues a prompt whose last line occurs in it before."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []
        self.cached_tokens = 0
        self.broken = False
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        self._answer({"model_path": "quote-finder"})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        prompt = request["text"]
        line = prompt.rsplit("\n", 1)[1]
        begin = prompt.index(line) + len(line)
        meta = {"id": f"id-{len(prompt)}", "prompt_tokens": 100}
        meta["cached_tokens"] = self.server.cached_tokens
        if self.server.broken and request["sampling_params"]["max_new_tokens"]:
            self._answer({"error": "out of memory"}, status=500)
        elif request.get("stream"):
            self._stream(prompt[begin:], request["sampling_params"]["max_new_tokens"], meta)
        else:
            self._answer({"text": prompt[begin : begin + 10], "meta_info": meta})

    def _stream(self, text: str, tokens: int, meta: dict[str, Any]) -> None:
        self.send_response(200)
        self.end_headers()
        # the first token takes long, and must not count
        time.sleep(0.2)
        for count in range(1, tokens + 1):
            content = {"text": text[:count], "meta_info": meta | {"completion_tokens": count}}
            self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())
            time.sleep(0.005)
        self.wfile.write(b"data: [DONE]\n\n")

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


TEXT = "\n".join(f"line {number} says {number * number} things" for number in range(100, 200))


def quotes() -> list[Quote]:
    found = []
    for number in (120, 150, 180):
        start = f"line {number} says {number * number}"
        found.append(Quote(number / 200, 0, f"\n{start}", (1,), " things\nli", (1, 2, 3)))
    return found


def test_one_branch_is_forked_for_each_quote(server: StandIn) -> None:
    seen: list[int] = []
    answers = ask(server.url, TEXT, quotes(), lambda: seen.append(1))
    assert [answer.got for answer in answers] == [" things\nli"] * 3
    assert all(answer.correct for answer in answers)
    assert len(seen) == 3
    # the document is cached once, before any branch
    first, *branches = server.requests
    assert first == {"text": TEXT, "sampling_params": {"max_new_tokens": 0}}
    assert {request["text"] for request in branches} == {TEXT + q.suffix for q in quotes()}
    for request in branches:
        sampling = request["sampling_params"]
        assert sampling["temperature"] == 0
        assert sampling["max_new_tokens"] == 3
        assert sampling["ignore_eos"] is True
    assert [answer.request_id for answer in answers] == [
        f"id-{len(TEXT + quote.suffix)}" for quote in quotes()
    ]


def test_a_server_that_fails_is_an_error(server: StandIn) -> None:
    server.broken = True
    with pytest.raises(ConnectionError, match=r"did not answer a request: .*out of memory"):
        ask(server.url, TEXT, quotes())


def test_speed_is_measured_cold_and_then_on_the_cached_document(server: StandIn) -> None:
    speed = measure_speed(server.url, TEXT, TEXT + quotes()[0].suffix)
    assert speed.prompt_tokens == 100
    assert speed.ttft_s > 0
    # 5 ms a token and some; with the first token it would be less than 100
    assert 100 < speed.decode_tokens_per_s < 200
    lengths = [request["sampling_params"]["max_new_tokens"] for request in server.requests]
    assert lengths == [1, 40, 40, 40]
    assert server.requests[0]["text"] == TEXT


def test_answers_that_arrive_at_once_say_nothing_about_speed(
    server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, slow = [(7.0, 40)], [(7.0, 10), (8.0, 40)]
    arrived = iter([at_once, slow, at_once, *[at_once] * 3])

    async def arrivals(state: object) -> list[tuple[float, int]]:
        return next(arrived)

    monkeypatch.setattr(program, "_arrivals", arrivals)
    prompt = TEXT + quotes()[0].suffix
    assert measure_speed(server.url, TEXT, prompt).decode_tokens_per_s == 30
    with pytest.raises(ValueError, match="all 40 tokens of an answer arrived at once"):
        measure_speed(server.url, TEXT, prompt)


def test_a_document_that_is_cached_already_is_no_cold_start(server: StandIn) -> None:
    server.cached_tokens = 64
    with pytest.raises(ValueError, match="knows the document already"):
        measure_speed(server.url, TEXT, TEXT + quotes()[0].suffix)


def test_a_real_documents_quotes_are_what_the_program_asks(
    server: StandIn, document: Document, tokenizer: Tokenizer
) -> None:
    picked = pick_quotes(document, tokenizer, 3)
    answers = ask(server.url, document.text, picked)
    assert [answer.quote for answer in answers] == picked
