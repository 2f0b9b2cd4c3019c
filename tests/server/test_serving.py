"""One real server on the tiny model: what any user of SGLang expects of it."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.servers import Serve, Server

pytestmark = pytest.mark.server


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(1, 1024) for _ in range(length)]


@pytest.fixture
def server(serve: Serve) -> Server:
    return serve()


def test_a_bare_command_line_serves(server: Server) -> None:
    info = httpx.get(f"{server.url}/server_info", timeout=30).json()
    assert info["attention_backend"] == "hip_attention"
    assert info["page_size"] == 64
    # a random model may well sample the end of the text
    sampling = {"max_new_tokens": 4, "ignore_eos": True}
    body = {"text": "Once upon a time", "sampling_params": sampling}
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=60).json()
    assert answer["meta_info"]["completion_tokens"] == 4
    assert "Traceback" not in server.log.read_text()


def test_a_cached_prefix_gives_the_same_tokens(server: Server) -> None:
    ids = prompt(1000)
    cold, warm = server.generate(ids), server.generate(ids)
    assert cold["meta_info"]["cached_tokens"] == 0
    # whole pages of the prompt, but for its last token
    assert warm["meta_info"]["cached_tokens"] == 999 // 64 * 64
    assert warm["output_ids"] == cold["output_ids"]


def test_requests_do_not_disturb_one_another(server: Server) -> None:
    prompts = [prompt(length, seed=length) for length in (1, 63, 64, 65, 300)]
    alone = [server.generate(ids)["output_ids"] for ids in prompts]
    sampling = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
    body = {"input_ids": prompts, "sampling_params": sampling}
    together = httpx.post(f"{server.url}/generate", json=body, timeout=300).json()
    assert [answer["output_ids"] for answer in together] == alone


def test_engine_takes_a_configuration(serve: Serve, tiny_llama: Path, tmp_path: Path) -> None:
    expected = serve().generate(prompt(40))["output_ids"]
    serve.stop()
    program = tmp_path / "program.py"
    program.write_text(
        f"""
import sglang

if __name__ == "__main__":
    engine = sglang.Engine(
        model_path={str(tiny_llama)!r},
        attention_backend="hip_attention",
        hip_config={{"budget": 128}},
        hip_preset="quality",
        log_level="info",
    )
    sampling = {{"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}}
    print(engine.generate(input_ids={prompt(40)}, sampling_params=sampling)["output_ids"])
    engine.shutdown()
"""
    )
    run = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=300, check=True
    )
    assert str(expected) in run.stdout
    # the rank that computes says what it was given
    assert '"budget":128' in run.stderr + run.stdout
    assert '"prefill":"dense"' in run.stderr + run.stdout


# in the gate tests/cluster has two ranks, on Ray
@pytest.mark.soak
def test_two_ranks_answer_as_one_does(serve: Serve) -> None:
    # sparse in both phases from the first position that can be, so that selection is compared too
    config = '{"window": 64, "budget": 64, "dense_threshold": 0}'
    prompts = [prompt(length, seed=length) for length in (5, 200, 1500)]
    one = [serve("--hip-config", config).generate(ids)["output_ids"] for ids in prompts]
    two = [
        serve("--hip-config", config, "--tp-size", "2").generate(ids)["output_ids"]
        for ids in prompts
    ]
    assert two == one
