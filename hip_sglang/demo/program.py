"""The demo as an SGLang frontend program: one document, and a branch of the future per quote."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import sglang as sgl

from hip_sglang.demo.quotes import Quote, whole_characters

# the frontend shows the traceback of every failed request; we raise it, in one line
warnings.filterwarnings("ignore", message="Error in stream_executor")


@dataclass(frozen=True)
class Answer:
    """What the server said to one quote."""

    quote: Quote
    got: str
    request_id: str  # SGLang's, as it stands in a trace

    @property
    def correct(self) -> bool:
        """Whether the text is the document's, character by character.

        Nothing is forgiven but a last character whose bytes the last token leaves incomplete: the
        server shows it as U+FFFD, and it counts on neither side.
        """
        return whole_characters(self.got) == self.quote.expected


@dataclass(frozen=True)
class Speed:
    """How fast one request was served alone.

    ``ttft_s``: seconds from sending the document to its first token, nothing cached: HTTP,
    tokenising and prefill. ``decode_tokens_per_s``: of one request on the cached document, from the
    arrival of its first token to that of its last, so that all of the above is left out.
    """

    prompt_tokens: int
    ttft_s: float
    decode_tokens_per_s: float


@sgl.function  # type: ignore[untyped-decorator]
def continue_quotes(
    s: Any, document: str, quotes: Sequence[Quote], on_answer: Callable[[], None]
) -> list[Answer]:
    """Ask for the continuation of every quote, all at once, on a document that is read once."""
    s += document
    # fork caches the prefix only where the worker has appended it by then
    s.sync()
    branches = s.fork(len(quotes))
    for branch, quote in zip(branches.states, quotes, strict=True):
        branch += quote.suffix
        branch += sgl.gen(
            "answer", max_tokens=len(quote.expected_ids), temperature=0, ignore_eos=True
        )
    answers = []
    for branch, quote in zip(branches.states, quotes, strict=True):
        _raise_error(branch)
        answers.append(Answer(quote, branch["answer"], branch.get_meta_info("answer")["id"]))
        on_answer()
    branches.join()
    return answers


@sgl.function  # type: ignore[untyped-decorator]
def _generate(s: Any, prompt: str, tokens: int) -> dict[str, Any]:
    s += prompt
    s += sgl.gen("answer", max_tokens=tokens, temperature=0, ignore_eos=True)
    _raise_error(s)
    meta: dict[str, Any] = s.get_meta_info("answer")
    return meta


def _raise_error(state: Any) -> None:
    """The frontend keeps what went wrong for whoever asks."""
    error = state.error()
    if error is not None:
        raise ConnectionError(f"the server did not answer a request: {error}") from error


def ask(
    url: str, document: str, quotes: Sequence[Quote], on_answer: Callable[[], None] = lambda: None
) -> list[Answer]:
    """Run ``continue_quotes`` against a running server.

    Raises ConnectionError where it does not answer.
    """
    state = continue_quotes.run(document, quotes, on_answer, backend=sgl.RuntimeEndpoint(url))
    answers: list[Answer] = state.ret_value
    return answers


@dataclass(frozen=True)
class Timed:
    """What one request was answered, and when."""

    text: str
    ttft_s: float
    step_s: float  # from token to token, on average
    cached_tokens: int
    meta: Mapping[str, Any]  # all that the server says of it


def ask_alone(
    url: str, prompt: str | Sequence[int], tokens: int, namespace: str | None = None
) -> Timed:
    """So many tokens behind a prompt, a text or its ids, nothing else running.

    What was read in one ``namespace`` is not known in another. Raises ConnectionError where the
    server does not answer.
    """
    body = {
        "text" if isinstance(prompt, str) else "input_ids": prompt,
        "extra_key": namespace,
        "stream": True,
        "sampling_params": {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True},
    }
    arrived, last = [], ""
    try:
        with httpx.Client(timeout=None) as client:
            # neither a client nor a prompt's JSON is made in no time
            request = client.build_request("POST", f"{url}/generate", json=body)
            began = time.perf_counter()
            stream = client.send(request, stream=True)
            stream.raise_for_status()
            for line in stream.iter_lines():
                if line.startswith("data: {"):
                    arrived.append(time.perf_counter())
                    last = line
        found = json.loads(last.removeprefix("data: "))
        meta = found["meta_info"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise ConnectionError(f"the server did not answer a request: {error}") from error
    step = (arrived[-1] - arrived[0]) / max(1, meta["completion_tokens"] - 1)
    return Timed(found["text"], arrived[0] - began, step, int(meta["cached_tokens"]), meta)


def measure_speed(
    url: str, document: str, prompt: str, *, answers: int = 3, tokens: int = 40
) -> Speed:
    """Read the document cold, then decode after ``prompt``, which begins with the document.

    The decode speed is the median of so many answers of so many tokens, without those that arrived
    all at once, as a few tokens may on a busy machine. The document must be new to the server, and
    nothing else running on it. Raises ValueError where it is not new or every answer arrived at
    once, ConnectionError where the server does not answer.
    """
    backend = sgl.RuntimeEndpoint(url)
    began = time.perf_counter()
    meta = _generate.run(document, 1, backend=backend).ret_value
    ttft = time.perf_counter() - began
    if meta["cached_tokens"] > 0.01 * meta["prompt_tokens"]:
        raise ValueError(f"the server at {url} knows the document already; start a fresh one")
    speeds = []
    for _ in range(answers):
        state = _generate.run(prompt, tokens, backend=backend, stream=True)
        arrivals = asyncio.run(_arrivals(state))
        _raise_error(state)
        (first_s, first), (last_s, last) = arrivals[0], arrivals[-1]
        if last > first:
            speeds.append((last - first) / (last_s - first_s))
    if not speeds:
        raise ValueError(
            f"all {tokens} tokens of an answer arrived at once, which says nothing about speed; "
            "ask for more"
        )
    return Speed(
        prompt_tokens=meta["prompt_tokens"],
        ttft_s=ttft,
        decode_tokens_per_s=statistics.median(speeds),
    )


async def _arrivals(state: Any) -> list[tuple[float, int]]:
    """When text arrived (in seconds), and how many tokens there were by then."""
    stream = state.text_async_iter("answer", return_meta_data=True)
    return [(time.perf_counter(), meta["completion_tokens"]) async for _, meta in stream]
