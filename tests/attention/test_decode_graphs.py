"""Decode passes that a graph holds are those that SGLang's batches ask for, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hip_kernels import ops
from hip_kernels.attend import fused
from hip_kernels.layout import PAGE_SIZE, QueryBlocks, Selection
from hip_kernels.offloaded import OffloadedKV
from hip_kernels.resolve import triton as resolving
from hip_kernels.summarize import triton as summarizing
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from torch import Tensor

from hip_sglang.attention import backend
from hip_sglang.telemetry import DecodeTotals
from tests.attention.served import Captured, Served
from tests.kernels.conftest import interpreted

__all__ = ["interpreted"]

HIP = {
    "sink": 64,
    "window": 64,
    "budget": 128,
    "dense_threshold": 256,
    "node_threshold": 1024,
    "beam": 512,
}


MORE: list[dict[str, Any]] = [
    {},
    {"refresh": 3, "second_look": 0, "per_layer": [{"layers": [0], "budget": 64, "refresh": 2}]},
    # four requests of five pages each
    {"second_look": 0, "offload": {"host_gib": 1, "device_tokens": 20 * PAGE_SIZE}},
]


def run(plain: Served, graphs: Served, captured: Captured, limit: float) -> None:
    """The same schedule twice: block by block by the reference, and by replays of one graph."""
    graphs.seed = plain.seed

    def both(do: Callable[[Served], None]) -> None:
        for served in (plain, graphs):
            do(served)

    def decode(rows: list[int]) -> None:
        both(lambda served: [served.grow(row, 1) for row in rows])
        given = plain.tensors(len(rows))
        graphs.seed = plain.seed
        found = captured.step(rows, [of.to(graphs.device) for of in given])
        for ours, theirs in zip(found, plain.decode(rows, given), strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=limit, atol=limit / 10)

    # through nodes and about to fill a page, sparse, through nodes, dense
    for row, tokens in ((0, 2302), (1, 700), (2, 2300), (3, 100)):
        both(lambda served, row=row, tokens=tokens: served.prompt(row, tokens))
    for _ in range(4):
        decode([0, 1, 2, 3])
    # its row goes to another, who is at the position that came next
    decode([2])
    length = plain.lengths[2]
    both(lambda served: served.leave(2))
    for row, tokens in ((4, 2250), (2, length)):
        both(lambda served, row=row, tokens=tokens: served.prompt(row, tokens))
    decode([2])
    # padding names row 0
    decode([3, 0])
    decode([0])


@pytest.mark.parametrize("more", MORE, ids=str)
def test_replays_are_what_each_batch_asks_for(
    interpreted: Callable[[ModuleType], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    more: dict[str, Any],
) -> None:
    plain, graphs = Served(HIP | more), Served(HIP | more)
    # what a backend does on a GPU
    interpreted(fused)
    interpreted(summarizing)
    graphs.backend.captures = True
    monkeypatch.setattr(ops, "_summaries", lambda of: summarizing)
    plainly = OffloadedKV.write

    def write(kv: OffloadedKV, slots: Tensor, key: Tensor, value: Tensor) -> None:
        # the interpreter takes seconds for a prompt's tokens
        (resolving.write if len(slots) <= 4 else plainly)(kv, slots, key, value)

    monkeypatch.setattr(OffloadedKV, "write", write)
    captured = Captured(graphs, 4, monkeypatch)
    run(plain, graphs, captured, 1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("more", MORE, ids=str)
def test_replays_on_a_gpu_are_what_each_batch_asks_for(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    monkeypatch.setattr(backend, "sglangs_own", lambda runner: None)
    graphs = Served(HIP | more, "cuda")
    run(Served(HIP | more), graphs, Captured(graphs, 4, monkeypatch), 1e-3)


class Counted:
    """In place of ``Telemetry``: what decode passes did, added up from their selections."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.sums = [0.0] * 8

    def observe(self, blocks: QueryBlocks, selection: Selection | None) -> None:
        plan = self.served.backend.plan
        assert plan is not None
        if not plan.decodes.all():
            return
        if selection is None:
            self.sums[1] += len(blocks)
            return
        found = (
            *(len(blocks), 0, *((0, len(blocks)) if blocks.reuses else (len(blocks), 0))),
            *(blocks.page.sum() + len(blocks), selection.exact.mean(1).sum()),
            *(selection.chosen.mean(1).sum(), selection.estimated.mean((1, 2)).sum()),
        )
        self.sums = [total + float(more) for total, more in zip(self.sums, found, strict=True)]

    def flush(self) -> None:
        pass


@pytest.mark.parametrize(
    "more",
    [
        {"refresh": 2, "per_layer": [{"layers": [1], "budget": 64, "refresh": 1}]},
        {"top_p": 0.5, "dense_layers": [1]},
        {"per_layer": [{"layers": [0], "top_p": 0.5}]},
    ],
    ids=str,
)
def test_a_graph_counts_what_its_steps_did(
    interpreted: Callable[[ModuleType], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    more: dict[str, Any],
) -> None:
    plain, graphs = Served(HIP | more), Served(HIP | more)
    counted = Counted(plain)
    for served in (plain, graphs):
        monkeypatch.setattr(served.backend, "telemetry", counted)
    graphs.backend.totals = totals = DecodeTotals(torch.device("cpu"))
    interpreted(fused)
    interpreted(summarizing)
    monkeypatch.setattr(ops, "_summaries", lambda of: summarizing)
    for served in (plain, graphs):
        for row, tokens in ((0, 1500), (1, 100), (2, 800)):
            served.prompt(row, tokens)
    graphs.backend.captures = True
    captured = Captured(graphs, 4, monkeypatch)
    for _ in range(3):
        given = plain.tensors(3)
        for served in (plain, graphs):
            for row in range(3):
                served.grow(row, 1)
        plain.decode([0, 1, 2], given)
        captured.step([0, 1, 2], given)
    assert min(counted.sums[:2]) > 0
    assert totals.read() == pytest.approx(counted.sums, rel=1e-4)
    assert totals.read() == [0.0] * 8


class Spy(TorchNativeAttnBackend):  # type: ignore[misc]
    """SGLang's plainest backend, which notes what it is asked for."""

    def __init__(self, runner: object) -> None:
        super().__init__(runner)
        self.asked: list[tuple[str, int]] = []

    def forward_extend(self, q, k, v, layer, *others: Any) -> torch.Tensor:
        self.asked.append(("prompt", layer.layer_id))
        return super().forward_extend(q, k, v, layer, *others)

    def forward_decode(self, q, k, v, layer, *others: Any) -> torch.Tensor:
        self.asked.append(("decode", layer.layer_id))
        return super().forward_decode(q, k, v, layer, *others)


@pytest.mark.parametrize(
    ("more", "asked"),
    [
        # prompts of 200 and 2000 tokens, then a decode step of both
        ({}, [("prompt", 0), ("prompt", 1)]),
        ({"prefill": "dense"}, [("prompt", 0), ("prompt", 1)] * 2),
        (
            {"dense_layers": [1]},
            [("prompt", 0), ("prompt", 1), ("prompt", 1), ("decode", 1)],
        ),
    ],
    ids=str,
)
def test_a_layer_that_keeps_every_page_leaves_a_pass_to_sglangs_own_backend(
    more: dict[str, Any], asked: list[tuple[str, int]]
) -> None:
    plain, other = Served(HIP | more), Served(HIP | more)
    spy = Spy(other.runner)
    other.backend.dense = spy
    found = []
    for served in (plain, other):
        for row, tokens in ((0, 200), (1, 2000)):
            served.prompt(row, tokens)
            served.grow(row, 1)
        found.append(served.decode([0, 1], served.tensors(2)))
    # what it wrote is summarised: decode steps prune by it
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert spy.asked == asked


def test_an_idle_rank_plans_nothing() -> None:
    served = Served(HIP)
    served.prompt(0, 100)
    batch = served.batch(ForwardMode.IDLE, [0])
    served.backend.init_forward_metadata(batch)
    assert served.backend.plan is None
