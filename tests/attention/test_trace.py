"""The record of what decode steps attended, written by the backend and read by the demo."""

import torch
from hip_kernels.layout import Summaries
from hip_kernels.ops import attend, plan_blocks, summarize
from hip_kernels.stored import PagedKV

from hip_sglang.attention.plan import ForwardPlan
from hip_sglang.attention.trace import SelectionTrace
from hip_sglang.config import HipConfig
from hip_sglang.demo.selections import read_trace

CONFIG = HipConfig.load(
    {"sink": 64, "window": 64, "budget": 128, "dense_threshold": 0, "second_look": 2}
)
PAGES = 20


def test_decode_steps_are_told_by_request_and_prefill_is_left_out(tmp_path):
    torch.manual_seed(0)
    layer = CONFIG.layer_plan(0)
    kv = PagedKV(torch.randn(PAGES * 64, 2, 8), torch.randn(PAGES * 64, 2, 8))
    summaries = Summaries.empty(PAGES, 2, 8, 8)
    summarize(kv, torch.arange(PAGES), summaries)
    # a chunk of 70 tokens that ends with its page, and two decode steps
    prefix, length = [570, 1000, 600], [640, 1001, 601]
    table = torch.arange(PAGES).repeat(3, 1)
    names, nothing, rows = ["chunk", "long", "short"], torch.arange(0), torch.arange(3)
    decodes = torch.tensor([False, True, True])
    plan = ForwardPlan(prefix, length, decodes, table, nothing, names, rows)
    query = torch.randn(72, 4, 8)
    trace = SelectionTrace(tmp_path / "trace.jsonl", rank=0)
    for blocks in plan_blocks(prefix, length, table, sparse_from=320, sparse_decode_from=320):
        selection = attend(query, kv, summaries, blocks, layer.pages, 0.35, torch.empty_like(query))
        assert selection is not None
        trace.write(7, layer, plan, blocks, selection)
    steps = read_trace(tmp_path / "trace.jsonl")
    assert set(steps) == {"long", "short"}
    [step] = steps["long"]
    assert (step.layer, step.position, step.visible_pages) == (7, 1000, 15)
    # as many tokens as two pages have, of up to eight
    assert all(2 <= len(pages) <= 8 for pages in step.chosen)
    # the first is the sink, the last of the visible ones the window
    assert all(pages <= set(range(1, 14)) for pages in step.chosen)
    assert step.share_read == round(layer.share_read(15, 5), 6)
    assert steps["short"][0].visible_pages == 9
