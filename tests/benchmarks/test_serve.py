"""The real server's speed against keep-all: who is asked what, and in which order."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from hip_sglang.bench import load_bench
from hip_sglang.demo.program import Speed
from hip_sglang.demo.server import Server
from hip_sglang.demo.vocabulary import load_tokenizer
from tests.benchmarks.conftest import Rows

serve = load_bench("serve")

# of the fakes: seconds to the first token, and tokens a second then
SPEEDS = {
    "ours": (2.0, 60.0),
    "keep_all": (8.0, 30.0),
    "torch_native": (4.0, 5.0),
    "sglang": (6.0, 20.0),
}


class FakeServers:
    """Stands in for booting and asking; a server's cache remembers until it is flushed."""

    def __init__(self) -> None:
        self.booted: dict[str, list[str]] = {}
        self.environments: list[Mapping[str, str]] = []
        self.alive: list[str] = []
        self.most = 0
        self.measured: list[tuple[str, int]] = []  # the cold readings, and tokens an answer
        self.cached: set[str] = set()

    @contextmanager
    def serve(
        self, arguments: Sequence[str], log: Path, environment: Mapping[str, str]
    ) -> Iterator[Server]:
        name = log.stem
        self.booted[name] = list(arguments)
        self.environments.append(environment)
        self.alive.append(name)
        self.most = max(self.most, len(self.alive))
        yield Server(f"http://{name}", boot_s=1.0)
        self.alive.remove(name)

    def post(self, url: str, timeout: float) -> httpx.Response:
        self.cached.discard(httpx.URL(url).host)
        return httpx.Response(200, request=httpx.Request("POST", url))

    def measure_speed(
        self, url: str, document: str, prompt: str, *, answers: int = 3, tokens: int = 40
    ) -> Speed:
        name = httpx.URL(url).host
        assert name in self.alive
        assert name not in self.cached, "a round before has left its document"
        assert prompt.startswith(document + "\n")
        self.cached.add(name)
        if answers > 1:
            self.measured.append((name, tokens))
        ttft, speed = SPEEDS[name]
        return Speed(len(document), ttft, speed)


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch, written_once: None) -> FakeServers:
    fake = FakeServers()
    monkeypatch.setattr(serve, "serve", fake.serve)
    monkeypatch.setattr(serve, "measure_speed", fake.measure_speed)
    monkeypatch.setattr(httpx, "post", fake.post)
    return fake


def test_both_are_asked_in_turn_with_an_empty_cache(
    servers: FakeServers, bench: Callable[..., dict[str, Any]], saved: Rows
) -> None:
    config = '{"budget": 1024}'
    arguments = ["--context", "4096", "--new", "8", "--rounds", "2", "--hip-config", config]
    found = bench("serve", *arguments, "--torch-native", "4096", "--save")
    assert found["bench"] == "serve"
    assert found["config"]["hip"] == {"budget": 1024}
    # a ratio over 1 is better for us
    assert found["ratios"] == {"ttft": 4.0, "decode": 2.0}
    assert found["values"]["keep_all_decode_tokens_per_s"] == 30.0
    assert found["values"]["torch_native_ttft_s"] == 4.0
    order = ["ours", "keep_all", "keep_all", "ours", "torch_native", "torch_native"]
    assert servers.measured == [(name, 8) for name in order]
    assert servers.alive == []

    rows = {row["metric"]: row for row in saved()}
    assert float(rows["ratio.ttft"]["p50"]) == 4.0
    assert json.loads(rows["ours.decode"]["config"])["context"] == 4096


def test_each_server_gets_its_own_arguments(
    servers: FakeServers, bench: Callable[..., dict[str, Any]]
) -> None:
    bench("serve", "--context", "4096", "--rounds", "1", "--hip-config", '{"budget": 1024}')
    assert servers.booted["ours"][-2:] == ["--hip-config", '{"budget": 1024}']
    assert servers.booted["keep_all"][-2:] == ["--hip-preset", "dense"]
    assert all("--sleep-on-idle" in arguments for arguments in servers.booted.values())


def test_another_model_is_measured_against_sglang_by_itself(
    servers: FakeServers, bench: Callable[..., dict[str, Any]], model_directory: Path
) -> None:
    arguments = ["--context", "4096", "--rounds", "1", "--sglang"]
    found = bench("serve", *arguments, "--model", str(model_directory))
    assert found["ratios"] == {"ttft": 4, "decode": 2, "ttft_sglang": 3, "decode_sglang": 3}
    assert found["config"]["model"] == model_directory.name
    for booted in servers.booted.values():
        assert booted[booted.index("--model-path") + 1] == str(model_directory)
    assert "--attention-backend" not in servers.booted["sglang"]


def test_on_a_gpu_a_server_is_alone(
    servers: FakeServers, bench: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve.torch.cuda, "is_available", lambda: True)
    bench("serve", "--context", "4096", "--new", "8", "--rounds", "2", "--sglang")
    assert [name for name, _ in servers.measured] == [
        *("ours", "ours", "keep_all", "keep_all", "sglang", "sglang")
    ]
    assert servers.most == 1


def test_the_servers_do_not_inherit_how_our_threads_are_tuned(
    servers: FakeServers, bench: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SGLANG_LOG_MS", "1")
    bench("serve", "--context", "4096", "--rounds", "1")
    assert [each.get("OMP_NUM_THREADS") for each in servers.environments] == [None, None]
    assert [each.get("SGLANG_LOG_MS") for each in servers.environments] == ["1", "1"]


def test_the_prompts_fit_the_context(model_directory: Path) -> None:
    prompts = serve.Prompts.make(model_directory, 4096, 64)
    encode = load_tokenizer(model_directory).encode
    tokens = len(encode(prompts.document.text + prompts.suffix).ids)
    assert 0.95 * 4096 < tokens <= 4096 - 64
    assert prompts.document.text.startswith(prompts.warm_up)


def test_a_document_that_is_too_short_for_the_context_is_refused(
    model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrieval = load_bench("retrieval")
    monkeypatch.setattr(retrieval, "library_text", lambda: "x = 1\n" * 2000)
    with pytest.raises(ValueError, match=r"Python's library, has \d,\d{3} tokens, fewer than"):
        retrieval.library_document(load_tokenizer(model_directory), 65536)


def test_a_log_that_an_error_names_is_kept() -> None:
    with pytest.raises(ChildProcessError), serve.workspace() as folder:
        raise ChildProcessError(f"see {folder}")
    assert folder.is_dir()
    folder.rmdir()
    with pytest.raises(ValueError, match="x"), serve.workspace() as folder:
        raise ValueError("x")
    assert not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--context", "long"], "--context: invalid int value: 'long'"),
        (["--context", "64"], "--context 64 is too small; give 4,096 or more"),
        (["--context", "2097152"], "has 1,048,576 positions"),
        (["--torch-native", "64"], "--torch-native 64 is too small; give 4,096 or more"),
        (["--torch-native", "2097152"], "--torch-native 2097152"),
        (["--context", "4096", "--new", "4000"], "--new 4000: give at most half"),
        (["--new", "1"], "--new 1 is too small"),
        (["--rounds", "0"], "--rounds 0 is too small"),
        (["--model", "/nowhere"], "--model /nowhere: there is no tokenizer.json"),
        (["--hip-config", '{"bugdet": 1}'], "did you mean budget?"),
        (["--contxt", "4096"], "unrecognized arguments: --contxt 4096"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    servers: FakeServers, refused: Callable[..., str], arguments: list[str], words: str
) -> None:
    assert words in refused("serve", *arguments)
    assert servers.booted == {}


@pytest.mark.soak
def test_the_real_servers_are_measured(bench: Callable[..., dict[str, Any]], saved: Rows) -> None:
    config = '{"budget": 512, "window": 256, "dense_threshold": 0}'
    arguments = ["--context", "4096", "--new", "64", "--rounds", "1", "--hip-config", config]
    found = bench("serve", *arguments, "--torch-native", "4096", "--sglang", "--save")
    assert 3800 < found["values"]["prompt_tokens"] <= 4096
    assert set(found["ratios"]) == {"ttft", "decode", "ttft_sglang", "decode_sglang"}
    assert min(*found["ratios"].values(), *found["values"].values()) > 0
    assert {row["metric"] for row in saved()} == {f"ratio.{name}" for name in found["ratios"]} | {
        f"{name}.{metric}" for name in SPEEDS for metric in ("ttft", "decode")
    }
