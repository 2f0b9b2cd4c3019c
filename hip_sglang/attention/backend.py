"""The attention backend that SGLang calls: write, summarise, attend."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from hip_kernels.layout import PAGE_SIZE, PagedKV
from hip_kernels.ops import attend, pool, summarize
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, SharedReadEnds
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch import Tensor

from hip_sglang.attention.plan import ForwardPlan
from hip_sglang.attention.selection_cache import SelectionCache
from hip_sglang.attention.trace import SelectionTrace
from hip_sglang.config import HipConfig
from hip_sglang.kv.node_directory import NodeDirectory
from hip_sglang.kv.summary_pool import SummaryPool
from hip_sglang.telemetry import Telemetry

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)


class HipAttentionBackend(AttentionBackend):  # type: ignore[misc]
    """HiP attention over SGLang's own KV pool, with page summaries beside it."""

    def __init__(self, runner: ModelRunner, config: HipConfig) -> None:
        super().__init__()
        self.req_to_token: Tensor = runner.req_to_token_pool.req_to_token
        # SGLang's models ask the backend for them, by these names
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        layers = range(
            self.token_to_kv_pool.start_layer,
            self.token_to_kv_pool.start_layer + self.token_to_kv_pool.layer_num,
        )
        self.layers = {layer: config.layer_plan(layer) for layer in layers}
        self.last_layer = layers[-1]
        self.config = config
        rows = len(self.req_to_token)
        self.cache: SelectionCache | None = None
        if config.refresh > 1:
            budget = config.layer_plan(0).pages.budget_pages
            self.cache = SelectionCache(rows, budget, config.refresh)
        self.nodes: NodeDirectory | None = None
        if config.nodes_from is not None and config.nodes_from < self.req_to_token.shape[1]:
            pages = self.token_to_kv_pool.get_kv_buffer(layers[0])[0].shape[0] // PAGE_SIZE
            self.nodes = NodeDirectory(pages, rows, self.req_to_token.device)
        self.summaries = SummaryPool(
            self.token_to_kv_pool, self.layers, self.nodes.places if self.nodes else 0
        )
        self.trace = SelectionTrace(config.trace, runner.tp_rank) if config.trace else None
        self.telemetry: Telemetry | None = None
        if runner.server_args.enable_metrics and runner.tp_rank == 0:
            self.telemetry = Telemetry()
        self.plan: ForwardPlan | None = None
        logger.info(
            "hip_attention: %s; summaries of %s pages = %.2f GiB",
            config.model_dump_json(),
            f"{self.summaries.pages:,}",
            self.summaries.nbytes / 2**30,
        )

    def support_triton(self) -> bool:
        return False

    def shared_read_ends(self, fm: ForwardMode) -> SharedReadEnds:
        # the plan copies what it needs of req_to_token; nothing reads that table later
        return SharedReadEnds.PRE_REPLAY

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        self.plan = ForwardPlan.of(
            forward_batch, self.req_to_token, self.config, self.nodes, self.cache
        )

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        """q [B, Hq * D] -> [B, Hq * Dv]; a decode step is a query block of one row."""
        return self.forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        """q [T, Hq * D], back to back over the requests -> [T, Hq * Dv]."""
        if given := [name for name, value in kwargs.items() if value is not None]:
            raise ValueError(
                f"hip_attention does not support {', '.join(given)} in attention (layer "
                f"{layer.layer_id}); serve this model with another --attention-backend"
            )
        plan = self.plan
        assert plan is not None
        if save_kv_cache and k is not None:
            loc = KVWriteLoc(forward_batch.out_cache_loc, None)
            self.token_to_kv_pool.set_kv_buffer(layer, loc, k, v, layer.k_scale, layer.v_scale)
        key, value = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        kv = PagedKV(key, value, *stored_scales(layer, key.dtype))
        summaries = self.summaries.pages_of(layer.layer_id)
        nodes = self.summaries.nodes_of(layer.layer_id)
        query = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        # rows of padding, where the batch has any, stay zero
        out = query.new_zeros(query.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        layer_plan = self.layers[layer.layer_id]
        pages_plan = replace(layer_plan.pages, logit_cap=layer.logit_cap)
        if layer_plan.prunes:
            # before attending: later blocks of this very chunk prune pages that it completes
            summarize(kv, plan.completed, summaries)
            if plan.nodes is not None:
                pool(summaries, plan.nodes.new_pages, plan.nodes.new_places, nodes)
        for blocks in plan.blocks(layer_plan):
            choice = None
            if self.cache is not None and blocks.reuses and blocks.local is not None:
                choice = self.cache.get(layer.layer_id, plan.rows[blocks.request])
            selection = attend(
                query, kv, summaries, blocks, pages_plan, layer.scaling, out, nodes, choice
            )
            if self.telemetry is not None:
                self.telemetry.observe(blocks, selection)
            if selection is None:
                continue
            if self.cache is not None and blocks.tokens.shape[1] == 1 and not blocks.reuses:
                self.cache.keep(layer.layer_id, plan.rows[blocks.request], selection.choice)
            if self.trace is not None:
                self.trace.write(layer.layer_id, layer_plan, plan, blocks, selection)
        if self.telemetry is not None and layer.layer_id == self.last_layer:
            self.telemetry.flush()
        return out.flatten(1)


def stored_scales(layer: RadixAttention, dtype: torch.dtype) -> tuple[float, float]:
    """What stored keys and values are to be multiplied by; SGLang divides only what it casts."""
    if dtype.itemsize > 1:
        return 1.0, 1.0
    return (
        1.0 if layer.k_scale is None else layer.k_scale_float,
        1.0 if layer.v_scale is None else layer.v_scale_float,
    )
