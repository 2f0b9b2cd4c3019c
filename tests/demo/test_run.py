"""The course of the demo: which server reads how much, what is asked again, and that all end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from hip_sglang.config import HipConfig
from hip_sglang.demo import run as demo
from hip_sglang.demo.program import Answer, Speed
from hip_sglang.demo.quotes import Quote
from hip_sglang.demo.run import run_demo, scaled_ways
from hip_sglang.demo.server import Server, serve


def test_the_contexts_of_the_three_ways(tmp_path: Path) -> None:
    ways = scaled_ways(65400, 65536, tmp_path / "trace.jsonl")
    assert [way.context for way in ways] == [65536, 32768, 8192]
    assert "balanced" in ways[0].arguments
    assert "dense" in ways[1].arguments
    assert "torch_native" in ways[2].arguments


def test_a_small_document_scales_all_contexts_down(tmp_path: Path) -> None:
    ways = scaled_ways(20_000, 65536, tmp_path / "trace.jsonl")
    assert [way.context for way in ways] == [20160, 10080, 2520]
    assert [way.context for way in scaled_ways(1500, 65536, tmp_path)] == [1664] * 3


class FakeServers:
    """Stands in for booting and asking; the first server answers some quotes wrongly."""

    def __init__(self, wrong: int, keep_all_knows: bool) -> None:
        self.wrong, self.keep_all_knows = wrong, keep_all_knows
        self.booted: list[dict[str, str]] = []
        self.asked: list[tuple[int, int]] = []  # (characters of the document, quotes)

    @contextmanager
    def serve(self, arguments: Sequence[str], log: Path) -> Iterator[Server]:
        self.booted.append(dict(zip(arguments[::2], arguments[1::2], strict=True)))
        yield Server(f"http://server/{len(self.booted)}", boot_s=1.0)

    def measure_speed(self, url: str, document: str, prompt: str) -> Speed:
        assert prompt.startswith(document)
        return Speed(prompt_tokens=1000, ttft_s=1.0, decode_tokens_per_s=10.0)

    def ask(self, url: str, document: str, quotes: Sequence[Quote], *_: object) -> list[Answer]:
        self.asked.append((len(document), len(quotes)))
        asked_again = len(quotes) < demo.QUOTES
        answers = []
        for index, quote in enumerate(quotes):
            wrong = index < self.wrong if url.endswith("/1") else asked_again
            wrong = wrong and not (asked_again and self.keep_all_knows)
            answers.append(Answer(quote, "?" if wrong else quote.expected, f"{url}/{index}"))
        return answers

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("serve", "measure_speed", "ask"):
            monkeypatch.setattr(demo, name, getattr(self, name))


@pytest.fixture
def doc(library: str, tmp_path: Path) -> Path:
    path = tmp_path / "doc.txt"
    path.write_text(library[:60_000])
    return path


@pytest.mark.parametrize(
    ("wrong", "keep_all_knows", "code"), [(0, True, 0), (2, False, 0), (2, True, 1)]
)
def test_only_a_quote_that_keep_all_finds_is_a_failure(
    doc: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wrong: int,
    keep_all_knows: bool,
    code: int,
) -> None:
    servers = FakeServers(wrong, keep_all_knows)
    servers.install(monkeypatch)
    assert run_demo(doc, tmp_path / "out", context=8192) == code

    hip, keep_all, native = servers.booted
    assert hip["--context-length"] == "8192"
    # the second opinion is asked at HiP's length, and costs nothing where nobody needs it
    assert keep_all["--context-length"] == ("8192" if wrong else "4096")
    assert native["--context-length"] == "2048"
    characters = [length for length, _ in servers.asked]
    assert [count for _, count in servers.asked] == [10, 10, *([wrong] if wrong else []), 10]
    if wrong:
        assert characters[2] == characters[0]

    report = json.loads((tmp_path / "out" / "demo-report.json").read_text())
    assert sum(not entry["correct"] for entry in report["quotes"]) == wrong
    assert [run["context"] for run in report["runs"]] == [8192, 4096, 2048]
    assert (tmp_path / "out" / "selections.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()


def test_a_bad_document_is_refused_before_a_server_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = FakeServers(0, True)
    servers.install(monkeypatch)
    path = tmp_path / "dull.txt"
    path.write_text("all the same\n" * 5000)
    with pytest.raises(ValueError, match="places that can be quoted"):
        run_demo(path, tmp_path / "out", context=8192)
    assert servers.booted == []


# stands in for `sglang.launch_server`: a server with a child, deaf to SIGTERM
STUBBORN = """
    import http.server, os, signal, subprocess, sys
    if "--fail" in sys.argv:
        print("Traceback (most recent call last):", "ValueError: no such model", sep="\\n")
        sys.exit("BrokenPipeError: the other process is gone")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "600"])
    class Ready(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(str(child.pid).encode())
    port = int(sys.argv[sys.argv.index("--port") + 1])
    http.server.HTTPServer(("127.0.0.1", port), Ready).serve_forever()
"""


@pytest.fixture
def stubborn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "stub" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text(textwrap.dedent(STUBBORN))
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setattr("hip_sglang.demo.server._STOP_SECONDS", 0.5)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


@pytest.mark.usefixtures("stubborn")
def test_a_server_and_its_children_end_with_the_block(tmp_path: Path) -> None:
    children = []

    def interrupted() -> None:
        with serve([], tmp_path / "log") as server:
            children.append(int(httpx.get(server.url).text))
            assert alive(children[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert gone(children[0])


@pytest.mark.usefixtures("stubborn")
def test_a_server_that_fails_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(ChildProcessError, match=r"ended with code 1 .*ValueError: no such model"),
        serve(["--fail"], tmp_path / "log"),
    ):
        pass


@pytest.mark.usefixtures("stubborn")
def test_a_terminated_demo_takes_its_server_along(tmp_path: Path) -> None:
    program = """
        import sys, time
        from pathlib import Path
        import httpx
        from hip_sglang.demo import server
        server._STOP_SECONDS = 0.5
        with server.unwind_on_signals(), server.serve([], Path(sys.argv[1])) as running:
            print(httpx.get(running.url).text, flush=True)
            time.sleep(600)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "log")],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    process.stdout.close()
    assert gone(child)


def test_an_offloaded_way_has_a_device_of_an_eighth(tmp_path: Path) -> None:
    hip, *others = scaled_ways(131_000, 131072, tmp_path / "trace.jsonl", token_bytes=4096)
    config = HipConfig.load(hip.arguments[hip.arguments.index("--hip-config") + 1])
    assert config.offload is not None
    assert config.offload.device_tokens == hip.device_tokens == 131072 // 8
    assert config.offload.host_gib * 2**30 > 131072 * 4096
    assert [way.device_tokens for way in others] == [None, None]
    # never less than one query reads
    hip, *_ = scaled_ways(20_000, 20_000, tmp_path / "trace.jsonl", token_bytes=4096)
    assert hip.device_tokens == HipConfig().start
