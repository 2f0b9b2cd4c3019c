"""SGLang's own acceptance kits against our sparse attention, on a random model.

The kits live in ``sglang.test``. What they ask of a model's knowledge is replaced by what this one
said when it was alone; what is left out:

* ``eval_accuracy_kit``, ``mmmu_vlm_kit``, ``lm_eval_kit`` and the programs ``few_shot_qa``,
  ``decode_int``, ``tool_use``, ``react``: need a competent model
* ``decode_json``, ``decode_json_regex``, ``dtype_gen``: a random model fills strings up to the
  limit of tokens, and the JSON stays open
* ``parallel_encoding``: asks for ``/concate_and_append_request``, which SGLang 0.5.21 does not have
* ``finish_stop_str``, ``finish_stop_regex_str``, ``finish_stop_eos``: wait for what a random
  model never says
* ``image_qa``, ``vlm_perf_kit``: no vision model
* ``completion_speculative``, ``chat_completion_speculative``, ``gen_min_new_tokens``: not for
  ``RuntimeEndpoint``, through which a server is asked
* ``stream_logprobs``: wants a server that streams increments, and text with every token, which
  half a character is not
* ``prefix_cache_branching_kit``: what it expects is SGLang's cache of recurrent states
* ``waiting_timeout``, ``running_timeout``: SGLang's scheduler alone, and minutes of waiting
* ``spec_*``, ``pd_parity_kit``, ``dsa_metadata_kit``, ``fwd_occupancy_kit``: what we refuse or
  what needs a GPU
"""

from __future__ import annotations

import json
import random
import unittest
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.servers import Serve, Server
from tests.tiny_llama import VOCABULARY, write_tiny_llama

pytestmark = [pytest.mark.server, pytest.mark.soak]

# two pages and the block's own are exact, so that all but the shortest prompts are pruned
HIP = {"sink": 0, "window": 64, "budget": 64, "dense_threshold": 0}
SPARSE = ("--hip-config", json.dumps(HIP), "--chat-template", "chatml")
KIT_VOCABULARY = 32_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("kits"), vocabulary=KIT_VOCABULARY)


@pytest.fixture
def server(serve: Serve, model: Path) -> Iterator[Server]:
    server = serve(*SPARSE, model=model)
    yield server
    assert server.is_healthy()
    assert "Traceback" not in server.log.read_text()


def run(kit: type, name: str, server: Server, **settings: Any) -> None:
    """One test of a kit, as unittest would run it."""
    given = {"base_url": server.url, "process": server.process, **settings}
    case = type(kit.__name__, (kit, unittest.TestCase), given)(name)
    assert isinstance(case, unittest.TestCase)
    case.debug()


def say(server: Server, text: str, new: int) -> str:
    sampling = {"temperature": 0, "max_new_tokens": new}
    body = {"text": text, "sampling_params": sampling}
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=120).raise_for_status()
    return str(answer.json()["text"])


@pytest.mark.parametrize(
    "name",
    [
        "test_health",
        "test_health_generate",
        "test_get_server_info",
        "test_get_model_info",
        "test_openai_chat_completion",
        "test_openai_completion",
    ],
)
def test_basic_api_contract(server: Server, name: str) -> None:
    from sglang.test.kits.basic_api_contract_kit import BasicAPIContractMixin

    run(BasicAPIContractMixin, name, server)


@pytest.mark.parametrize(
    "name", ["test_streaming_response", "test_concurrent_requests", "test_long_prompt"]
)
def test_basic_scheduler_stress(server: Server, name: str) -> None:
    from sglang.test.kits import basic_scheduler_stress_kit as kit

    new = kit.BasicSchedulerStressMixin.sanity_max_new_tokens_short
    prompts = {kit._CONCURRENT_PREFIX + ask: city for ask, city in kit._CONCURRENT_QA}
    alone = {text: say(server, text, new) for text in prompts}
    streamed = say(server, kit._CONCURRENT_QA[0][0], new)
    assert len({*alone.values(), streamed}) == 9

    class WhatItSaidAlone(kit.BasicSchedulerStressMixin):  # type: ignore[misc]
        def _stress_generate(self, prompt: str, max_new_tokens: int) -> str:
            said: str = super()._stress_generate(prompt, max_new_tokens)
            return prompts[prompt] if alone.get(prompt) == said else said

        def assertIn(self, member: str, text: str) -> None:  # noqa: N802
            assert (member, text) == ("paris", streamed.lower())

    run(WhatItSaidAlone, name, server)


@pytest.mark.parametrize("name", ["test_determinism_temp_zero", "test_max_token_one"])
def test_basic_decode_correctness(server: Server, name: str) -> None:
    from sglang.test.kits.basic_decode_correctness_kit import BasicDecodeCorrectnessMixin

    run(BasicDecodeCorrectnessMixin, name, server)


def test_abort_all(server: Server) -> None:
    from sglang.test.kits.abort_timeout_kit import AbortAllMixin

    run(AbortAllMixin, "test_abort_all", server)


def test_pause_and_resume(server: Server) -> None:
    from sglang.test.kits.pause_generation_kit import PauseResumeInPlaceMixin

    run(PauseResumeInPlaceMixin, "test_pause_resume_in_place", server)


def test_matched_stop(server: Server, model: Path) -> None:
    from sglang.test.kits.matched_stop_kit import MatchedStopMixin

    run(MatchedStopMixin, "test_finish_length", server, model=str(model))


def test_multiturn_cache_hits(server: Server, model: Path, tmp_path: Path) -> None:
    from sglang.test.kits.cache_hit_kit import run_multiturn_cache_hit_test

    # the kit cuts its turns from such a file, and would download one
    words = Path(__file__).read_text().split()
    turns = []
    for seed in range(64):
        random.Random(seed).shuffle(words)
        turns.append({"conversations": [{"value": " ".join(words)}, {"value": "yes"}]})
    (tmp_path / "conversations.json").write_text(json.dumps(turns))
    found = run_multiturn_cache_hit_test(
        server.url, str(model), dataset_path=str(tmp_path / "conversations.json")
    )
    assert found["overall"]["cache_hit_rate"] > 0.4


@pytest.mark.parametrize(
    "name",
    [
        "mt_bench",
        "select",
        "expert_answer",
        "parallel_decoding",
        "stream",
        "regex",
    ],
)
def test_programs(server: Server, name: str) -> None:
    import sglang
    from sglang.test import test_programs as programs

    program = getattr(programs, f"test_{name}")
    if name in ("select", "expert_answer"):
        program = partial(program, check_answer=False)
    sglang.set_default_backend(sglang.RuntimeEndpoint(server.url))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        program()
    # what goes wrong in a program's thread is a warning to its caller
    assert not [warning for warning in warned if "Error in stream" in str(warning.message)]


# mean over prompts of the kit's estimate of KL. measured: 0.0006, for a decode step chooses for
# itself and with a second look, and a page of a prompt together; keep-all 1.2e-10
KL_BOUNDS = {"balanced": 0.003, "dense": 1e-8, "offload": 0.003}
# one query reads three pages, and sixteen requests run: the device holds a third of a prompt each
OFFLOAD = {**HIP, "offload": {"host_gib": 0.25, "device_tokens": 16 * 3 * 64}}


@pytest.mark.parametrize("preset", list(KL_BOUNDS))
@pytest.mark.parametrize(
    "name",
    [
        "test_input_output_logprobs_match_prefill_cache_hit",
        "test_input_output_logprobs_match_decode_cache_hit",
    ],
)
def test_kl_divergence(serve: Serve, model: Path, preset: str, name: str) -> None:
    """What decode steps said on a cached prefix against what a fresh prefill says of it."""
    from sglang.test import kl_test_utils
    from sglang.test.kits.kl_divergence_kit import KLDivergenceMixin

    generator = random.Random(1)
    prompts = [
        [generator.randrange(1, VOCABULARY) for _ in range(generator.randrange(300, 2000))]
        for _ in range(16)
    ]
    key = f"{model}_{kl_test_utils.DEFAULT_PROMPT_TOKENS}_{kl_test_utils.DEFAULT_NUM_SAMPLES}"
    # the kit's own cache, so that it downloads no data set
    kl_test_utils._cached_input_ids[key] = prompts
    how = (*SPARSE, "--hip-preset", preset)
    if preset == "offload":
        how = ("--hip-config", json.dumps(OFFLOAD), *SPARSE[2:])
    server = serve(*how, model=model)
    run(
        KLDivergenceMixin,
        name,
        server,
        model=str(model),
        kl_div_thres=KL_BOUNDS[preset],
        kl_div_prefill_max_new_tokens=96,
        kl_div_decode_max_new_tokens=96,
    )
    assert "Traceback" not in server.log.read_text()


@pytest.mark.timeout(5400)
@pytest.mark.parametrize("kit", [pytest.param("radix", id="radix-long")])
def test_radix_attention(server: Server, kit: str) -> None:
    """Four hundred prompts that part from one another; the last, for it takes many minutes."""
    from sglang.test.kits.radix_cache_server_kit import run_radix_attention_test

    random.seed(0)
    run_radix_attention_test(server.url)
