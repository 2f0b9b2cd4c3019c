"""The counters agree with what the kernels did, a block at a time."""

import pytest
import torch
from hip_kernels.layout import Summaries
from hip_kernels.ops import attend, plan_blocks, summarize
from hip_kernels.stored import PagedKV
from prometheus_client import REGISTRY

from hip_sglang.config import HipConfig
from hip_sglang.telemetry import Telemetry

CONFIG = HipConfig.load({"sink": 64, "window": 64, "budget": 128, "dense_threshold": 320})
PAGES = 20


@pytest.fixture(scope="module")
def telemetry():
    return Telemetry()


def value(name, **labels):
    return REGISTRY.get_sample_value(f"hip_sglang_{name}_total", labels) or 0.0


def test_counters_are_those_of_the_selections(telemetry):
    torch.manual_seed(0)
    plan = CONFIG.layer_plan(0)
    kv = PagedKV(torch.randn(PAGES * 64, 2, 8), torch.randn(PAGES * 64, 2, 8))
    summaries = Summaries.empty(PAGES, 2, 8, 8)
    summarize(kv, torch.arange(PAGES), summaries)
    # a chunk over three pages of which the last two prune; decode steps, one of them dense
    prefix, length = [300, 1000, 100], [448, 1001, 101]
    table = torch.arange(PAGES).repeat(3, 1)
    query = torch.randn(150, 4, 8)
    blocks = plan_blocks(
        prefix,
        length,
        table,
        sparse_from=plan.sparse_from,
        sparse_decode_from=plan.sparse_decode_from,
    )
    shares = {"prefill": 0.0, "decode": 0.0}
    for some in blocks:
        found = attend(query, kv, summaries, some, plan.pages, 0.35, torch.empty_like(query))
        telemetry.observe(some, found)
        if found is not None:
            phase = "decode" if some.tokens.shape[1] == 1 else "prefill"
            shares[phase] += float(found.estimated.mean((1, 2)).sum())
    assert value("visible_pages", phase="decode") == 0, "read once a pass"
    telemetry.flush()
    assert value("query_blocks", phase="decode", kind="sparse") == 1
    assert value("query_blocks", phase="decode", kind="dense") == 1
    assert value("query_blocks", phase="prefill", kind="sparse") == 2
    assert value("query_blocks", phase="prefill", kind="dense") == 1
    assert value("choices", kind="fresh") == 1
    assert value("visible_pages", phase="decode") == 16
    assert value("exact_pages", phase="decode") == 5
    assert value("chosen_pages", phase="decode") == 2
    assert value("visible_pages", phase="prefill") == 6 + 7
    assert value("exact_pages", phase="prefill") == 5 + 5
    assert value("estimated_mass", phase="decode") == pytest.approx(shares["decode"])
    assert value("estimated_mass", phase="prefill") == pytest.approx(shares["prefill"])
    assert 0 < shares["decode"] < 1
