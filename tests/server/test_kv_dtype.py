"""A KV cache in eight bits: what is stored is what is attended, exact pages and summaries alike."""

from __future__ import annotations

import json

import pytest

from tests.server.test_batches import HIP, ask, prompt
from tests.servers import Serve

pytestmark = [pytest.mark.server, pytest.mark.soak]


@pytest.mark.parametrize("dtype", ["fp8_e4m3", "fp8_e5m2"])
def test_an_fp8_cache_comes_near_to_a_float_one(serve: Serve, dtype: str) -> None:
    sparse = ("--hip-config", json.dumps(HIP))
    lengths = (200, 1130, 2500)
    exact = [ask(serve(*sparse), prompt(length))[:5] for length in lengths]
    stored = serve(*sparse, "--kv-cache-dtype", dtype)
    for length, values in zip(lengths, exact, strict=True):
        found = ask(stored, prompt(length))[:5]
        assert found != values
        assert found == pytest.approx(values, abs=0.3)
