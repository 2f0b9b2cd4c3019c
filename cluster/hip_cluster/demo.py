"""``make demo-cluster``: two local Ray nodes, TP=2, a router, and a rank that dies in between."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

from rich.console import Console

from hip_cluster.local import LocalEndpoint, local_endpoint, local_nodes
from hip_cluster.ports import free_port
from hip_cluster.view import show
from hip_sglang.demo.corpus import Document, library_text
from hip_sglang.demo.model import write_model
from hip_sglang.demo.program import Answer, ask
from hip_sglang.demo.quotes import Quote, pick_quotes
from hip_sglang.demo.server import unwind_on_signals
from hip_sglang.demo.vocabulary import load_tokenizer

CONTEXT = 16384
QUOTES = 10
SPARE_TOKENS = 8192
PATIENCE_SECONDS = 900.0


def main() -> int:
    """0 where every quote is right in the end."""
    console, out = Console(), Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out")
    folder = out / "cluster"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with unwind_on_signals():
        console.print("writing the model, and a document of Python's library")
        write_model(folder / "model")
        tokenizer = load_tokenizer(folder / "model")
        text = Document.cut(library_text(), tokenizer, CONTEXT - 128)
        quotes = pick_quotes(text, tokenizer, QUOTES)
        with local_nodes((1, 1), folder) as nodes:
            console.print(f"two Ray nodes at {nodes.address}; starting TP=2 and the router")
            words = ("--address", nodes.address)
            with local_endpoint(document_of(folder / "model"), folder, *words) as endpoint:
                return quote(endpoint, text.text, quotes, console)


def document_of(model: Path) -> dict[str, object]:
    """The endpoint's document."""
    return {
        "name": "demo",
        "model": {"path": str(model.resolve()), "context_length": CONTEXT},
        "parallel": {"tp": 2, "nodes": 2, "device": "cpu"},
        "memory": {"staging_gib_per_rank": 0.25, "shm_gib": 0.25, "reserve_gib": 0.5},
        "server": {
            "port": free_port("127.0.0.1"),
            "arguments": ["--max-total-tokens", str(CONTEXT + SPARE_TOKENS), "--sleep-on-idle"],
        },
        "router": {"mode": "managed"},
    }


def quote(endpoint: LocalEndpoint, text: str, quotes: list[Quote], console: Console) -> int:
    """Half of the quotes, a death, and then all of them."""
    took = endpoint.wait_for("SERVING")
    console.print(f"serving at {endpoint.url} after {took:.0f} s")
    show(endpoint.status())
    first = ask(endpoint.url, text, quotes[: QUOTES // 2])
    console.print(f"{right(first)} of {len(first)} quotes right; killing rank 1")
    began = time.monotonic()
    os.kill(endpoint.pid_of("rank 1"), signal.SIGKILL)
    answers = ask_until_answered(endpoint, text, quotes)
    console.print(
        f"{right(answers)} of {len(answers)} right, {time.monotonic() - began:.0f} s later"
    )
    show(endpoint.status())
    return 0 if right(first) == len(first) and right(answers) == len(answers) == QUOTES else 1


def ask_until_answered(endpoint: LocalEndpoint, text: str, quotes: list[Quote]) -> list[Answer]:
    """As a client does that is told to come again."""
    began = time.monotonic()
    while True:
        try:
            return ask(endpoint.url, text, quotes)
        # the frontend's word for a 503 to its first question is a plain RuntimeError
        except (ConnectionError, AssertionError, OSError, RuntimeError):
            if time.monotonic() - began > PATIENCE_SECONDS:
                raise
            time.sleep(1)


def right(answers: list[Answer]) -> int:
    """How many of them are the document's own words."""
    return sum(answer.correct for answer in answers)


if __name__ == "__main__":
    sys.exit(main())
