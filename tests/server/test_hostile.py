"""Requests that are wrong, late or rude: each gets its answer, and the server lives."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.server.test_serving import prompt
from tests.servers import Serve, Server
from tests.tiny_llama import VOCABULARY

pytestmark = pytest.mark.server

CONTEXT = 32768


@pytest.fixture
def server(serve: Serve) -> Server:
    return serve()


def post(server: Server, **body: Any) -> httpx.Response:
    # not httpx's own JSON, which refuses NaN before the server can
    return httpx.post(
        f"{server.url}/generate",
        content=json.dumps(body),
        headers={"Content-Type": "application/json"},
        timeout=120,
    )


BAD_REQUESTS = {
    "token past the vocabulary": {"input_ids": [1, VOCABULARY]},
    "negative token": {"input_ids": [-1, 5]},
    "huge token": {"input_ids": [2**40]},
    "token that is a word": {"input_ids": [1, "two"]},
    "one of a batch": {"input_ids": [[1, 2], [3, VOCABULARY]]},
    "no tokens": {"input_ids": []},
    "a prompt of the whole context": {"input_ids": [1] * CONTEXT},
    "one token too long": {
        "input_ids": [1] * (CONTEXT - 9),
        "sampling_params": {"max_new_tokens": 10},
    },
    "temperature NaN": {"input_ids": [1], "sampling_params": {"temperature": float("nan")}},
    "temperature inf": {"input_ids": [1], "sampling_params": {"temperature": float("inf")}},
    "temperature below 0": {"input_ids": [1], "sampling_params": {"temperature": -1.0}},
    "top_p NaN": {"input_ids": [1], "sampling_params": {"top_p": float("nan")}},
    "stop token past the vocabulary": {
        "input_ids": [1],
        "sampling_params": {"stop_token_ids": [VOCABULARY], "min_new_tokens": 2},
    },
    "bias NaN": {"input_ids": [1], "sampling_params": {"logit_bias": {"5": float("nan")}}},
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_refused_and_the_server_lives(server: Server, name: str) -> None:
    answer = post(server, **BAD_REQUESTS[name])
    assert 400 <= answer.status_code < 500, answer.text
    assert len(server.generate([1, 2, 3], 4)["output_ids"]) == 4


def test_what_is_wrong_is_said(server: Server) -> None:
    text = post(server, input_ids=[1, VOCABULARY]).text
    assert f"input_ids[1] = {VOCABULARY} is not a token of this model" in text
    assert f"from 0 to {VOCABULARY - 1}" in text


def test_clients_that_hang_up_do_no_harm(server: Server) -> None:
    expected = server.generate(prompt(700, seed=9))["output_ids"]
    with ThreadPoolExecutor(16) as clients:
        list(clients.map(lambda _: hang_up(server, prompt(6000, seed=8)), range(32)))
    assert server.generate(prompt(700, seed=9))["output_ids"] == expected
    become_idle(server)


def test_two_hundred_at_once_are_all_answered(server: Server) -> None:
    prompts = {length: prompt(length, seed=length) for length in (1, 64, 90, 130, 200)}
    expected = {length: server.generate(ids, 4)["output_ids"] for length, ids in prompts.items()}
    with ThreadPoolExecutor(200) as clients:
        found = clients.map(
            lambda length: (length, server.generate(prompts[length], 4)["output_ids"]),
            list(prompts) * 40,
        )
        assert all(ids == expected[length] for length, ids in found)
    become_idle(server)


@pytest.mark.soak
def test_a_client_that_hangs_up_while_its_prompt_is_read_does_no_harm(serve: Serve) -> None:
    config = {"window": 128, "budget": 128, "dense_threshold": 256}
    # sglang looks every few seconds whether a client is gone, so that reading must take longer
    chunks = ("--chunked-prefill-size", "128")
    server = serve("--hip-config", json.dumps(config), *chunks)
    ids = prompt(30_000, seed=12)
    expected = server.generate(prompt(700, seed=9))["output_ids"]
    hang_up(server, ids)
    become_idle(server)
    # what was read of it is cached, and must be whole: the rest is read on top of it
    on_top = server.generate(ids)
    assert 0 < on_top["meta_info"]["cached_tokens"] < 29_999 // 64 * 64
    flush(server)
    assert server.generate(ids)["output_ids"] == on_top["output_ids"]
    assert server.generate(prompt(700, seed=9))["output_ids"] == expected


def hang_up(server: Server, ids: list[int], seconds: float = 0.5) -> None:
    """Ask for many tokens, and be gone before they come."""
    body = json.dumps({"input_ids": ids, "sampling_params": {"max_new_tokens": 2000}}).encode()
    head = (
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n"
    )
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head + body)
        time.sleep(seconds)


def become_idle(server: Server) -> None:
    """Requests of clients that are gone are aborted, and give their tokens back."""
    deadline = time.monotonic() + 60
    while server_is_busy(server):
        assert time.monotonic() < deadline, "requests of absent clients still run"
        time.sleep(0.5)


def flush(server: Server) -> None:
    become_idle(server)
    httpx.post(f"{server.url}/flush_cache", timeout=60).raise_for_status()


def server_is_busy(server: Server) -> bool:
    loads = httpx.get(f"{server.url}/v1/loads", timeout=30).json()["loads"]
    return any(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)
