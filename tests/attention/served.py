"""A backend with SGLang's pools and no model: prompts, decode steps, and the graphs of these."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hip_kernels.layout import PAGE_SIZE
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from hip_sglang.attention.backend import HipAttentionBackend
from hip_sglang.config import HipConfig
from hip_sglang.kv.pool import OffloadedKVPool
from tests.attention.graphs import CudaGraph, Graph

LAYERS, KV_HEADS, GROUP, WIDTH = 2, 1, 2, 16
ROWS, CONTEXT, POOL = 5, 4096, 180


class Runner:
    """What the backend asks of SGLang's model runner: real pools, and no model."""

    def __init__(self, device: str, config: HipConfig, dtype: torch.dtype) -> None:
        table = torch.zeros(ROWS, CONTEXT, dtype=torch.int32, device=device)
        self.req_to_token_pool = SimpleNamespace(req_to_token=table)
        size, common = POOL * PAGE_SIZE, {
            "dtype": dtype, "head_num": KV_HEADS, "head_dim": WIDTH, "v_head_dim": WIDTH,
            "layer_num": LAYERS, "start_layer": 0, "end_layer": LAYERS - 1, "device": device,
        }  # fmt: skip
        if (offload := config.offload) is None:
            self.token_to_kv_pool = MHATokenToKVPool(
                size, page_size=PAGE_SIZE, enable_memory_saver=False, **common
            )
        else:
            self.token_to_kv_pool = OffloadedKVPool(
                size,
                device_tokens=offload.device_tokens,
                miss_policy=offload.miss_policy,
                **common,
            )
        self.server_args = SimpleNamespace(enable_metrics=False, pp_size=1, tp_size=1)
        self.tp_rank = 0
        self.device = device


class Served:
    """A backend with requests: prompts as one pass each, and decode steps of some of them."""

    def __init__(
        self,
        hip: dict[str, Any],
        device: str = "cpu",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        config = HipConfig.load(hip)
        self.runner = Runner(device, config, dtype)
        self.backend = HipAttentionBackend(self.runner, config)
        self.layers = [
            RadixAttention(KV_HEADS * GROUP, WIDTH, 0.5, KV_HEADS, layer) for layer in range(LAYERS)
        ]
        self.device = device
        self.random = random.Random(seed)
        self.pages = list(range(1, POOL + 1))
        self.random.shuffle(self.pages)
        self.lengths: dict[int, int] = {}
        self.seed = seed

    @property
    def table(self) -> torch.Tensor:
        found: torch.Tensor = self.runner.req_to_token_pool.req_to_token
        return found

    def grow(self, row: int, tokens: int) -> None:
        before = self.lengths.get(row, 0)
        self.lengths[row] = before + tokens
        for position in range(before, before + tokens):
            if position % PAGE_SIZE == 0:
                page = self.pages.pop()
                slots = page * PAGE_SIZE + torch.arange(PAGE_SIZE).int()
                self.table[row, position : position + PAGE_SIZE] = slots.to(self.device)

    def leave(self, row: int) -> None:
        count = -(-self.lengths.pop(row) // PAGE_SIZE)
        freed = self.table[row, : count * PAGE_SIZE : PAGE_SIZE] // PAGE_SIZE
        self.pages += freed.tolist()
        if isinstance(self.runner.token_to_kv_pool, OffloadedKVPool):
            self.runner.token_to_kv_pool.forget(freed.long())

    def prompt(self, row: int, tokens: int) -> None:
        self.grow(row, tokens)
        length = self.lengths[row]
        batch = self.batch(ForwardMode.EXTEND, [row])
        batch.extend_prefix_lens_cpu = [length - tokens]
        batch.extend_prefix_lens = torch.tensor([length - tokens], device=self.device)
        batch.extend_seq_lens = torch.tensor([tokens], device=self.device)
        batch.out_cache_loc = self.table[row, length - tokens : length].long()
        self.backend.init_forward_metadata(batch)
        self.attend(batch, *self.tensors(tokens), "forward_extend")

    def decode(self, rows: list[int], given: list[torch.Tensor]) -> list[torch.Tensor]:
        """A pass without a graph."""
        batch = self.batch(ForwardMode.DECODE, rows)
        self.backend.init_forward_metadata(batch)
        return self.attend(batch, *given, "forward_decode")

    def batch(self, mode: ForwardMode, rows: list[int]) -> SimpleNamespace:
        """As SGLang's ``ForwardBatch``, of the last tokens of some requests."""
        lengths = torch.tensor([self.lengths[row] for row in rows])
        row = torch.tensor(rows, device=self.device)
        return SimpleNamespace(
            forward_mode=mode,
            batch_size=len(rows),
            rids=[str(row) for row in rows],
            req_pool_indices=row,
            seq_lens=lengths.to(self.device),
            seq_lens_cpu=lengths,
            out_cache_loc=self.table[row, lengths.to(self.device) - 1].long(),
            encoder_lens=None,
        )

    def tensors(self, rows: int) -> list[torch.Tensor]:
        """Of all layers: queries, keys and values [L, T, H * D]."""
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        heads = KV_HEADS * GROUP, KV_HEADS, KV_HEADS
        made = [torch.randn(LAYERS, rows, n * WIDTH, generator=generator) for n in heads]
        return [of.to(self.device) for of in made]

    def attend(self, batch: Any, q, k, v, phase: str) -> list[torch.Tensor]:
        forward = getattr(self.backend, phase)
        k, v = (of.unflatten(-1, (KV_HEADS, WIDTH)) for of in (k, v))
        return [forward(q[n], k[n], v[n], layer, batch) for n, layer in enumerate(self.layers)]


class Captured:
    """SGLang's decode graph of one batch size: its buffers, and what was recorded of them."""

    def __init__(self, served: Served, size: int, patch: pytest.MonkeyPatch) -> None:
        self.served, self.size = served, size
        ones = torch.ones(size, dtype=torch.int64)
        self.batch = SimpleNamespace(
            forward_mode=ForwardMode.DECODE,
            batch_size=size,
            req_pool_indices=torch.zeros_like(ones).to(served.device),
            seq_lens=ones.to(served.device),
            seq_lens_cpu=ones.clone(),
            out_cache_loc=torch.zeros_like(ones).to(served.device),
            encoder_lens=None,
        )
        self.given = served.tensors(size)
        self.graph = Graph(patch) if served.device == "cpu" else CudaGraph()
        backend = served.backend
        backend.init_forward_metadata_out_graph(self.batch, in_capture=True)
        # first without recording
        backend.init_forward_metadata_in_graph(self.batch)
        served.attend(self.batch, *self.given, "forward_decode")
        with self.graph.capture():
            backend.init_forward_metadata_in_graph(self.batch)
            self.found = served.attend(self.batch, *self.given, "forward_decode")

    def step(self, rows: list[int], given: list[torch.Tensor]) -> list[torch.Tensor]:
        """As ``DecodeCudaGraphRunner`` does: fill the buffers, prepare, replay."""
        batch, real, now = self.batch, len(rows), self.served.batch(ForwardMode.DECODE, rows)
        for name, fill in (
            ("req_pool_indices", 0),
            ("out_cache_loc", 0),
            ("seq_lens", 1),
            ("seq_lens_cpu", 1),
        ):
            getattr(batch, name).fill_(fill)[:real] = getattr(now, name)
        for buffer, value in zip(self.given, given, strict=True):
            buffer[:, :real] = value
        self.served.backend.init_forward_metadata_out_graph(batch)
        self.graph.replay()
        return [found[:real].clone() for found in self.found]
