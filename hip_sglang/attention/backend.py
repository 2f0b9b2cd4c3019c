"""The attention backend that SGLang calls: write, summarise, attend."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from hip_kernels.layout import PAGE_SIZE, Choice, SparsePlan
from hip_kernels.ops import attend, attend_steps, pool, summarize
from hip_kernels.stored import PagedKV, StoredKV
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, SharedReadEnds
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch import Tensor

from hip_sglang.attention.decode_plan import DecodePlan, NodeTables
from hip_sglang.attention.dense import sglangs_own
from hip_sglang.attention.plan import ForwardPlan, NodePlan
from hip_sglang.attention.selection_cache import SelectionCache
from hip_sglang.attention.trace import SelectionTrace
from hip_sglang.config import HipConfig, LayerPlan
from hip_sglang.kv.node_directory import NodeDirectory
from hip_sglang.kv.summary_pool import SummaryPool, pages_of
from hip_sglang.telemetry import PASSES_A_LOOK, DecodeTotals, Telemetry

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)


class HipAttentionBackend(AttentionBackend):  # type: ignore[misc]
    """HiP attention over SGLang's own KV pool, with page summaries beside it.

    On a GPU passes of decode steps go by a ``DecodePlan``, which CUDA graphs can hold. ``dense``,
    SGLang's own backend, is left prompts below the threshold, and whatever a layer never prunes.
    """

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
        on_gpu = self.req_to_token.is_cuda
        self.dense = sglangs_own(runner) if on_gpu and config.offload is None else None
        self.captures = on_gpu and config.captures
        self.extend_dummy_seqs_capped_by_req_pool = (
            self.dense is not None and self.dense.extend_dummy_seqs_capped_by_req_pool
        )
        rows, device = len(self.req_to_token), self.req_to_token.device
        self.cache: SelectionCache | None = None
        if config.refreshes != {1}:
            budgets = {layer: plan.pages.entries for layer, plan in self.layers.items()}
            self.cache = SelectionCache(rows, budgets, device)
        self.nodes: NodeDirectory | None = None
        self.node_tables: NodeTables | None = None
        context = self.req_to_token.shape[1]
        if config.nodes_from is not None and config.nodes_from < context:
            self.nodes = NodeDirectory(pages_of(self.token_to_kv_pool), rows, device)
            if config.decode == "sparse":
                start, pages = config.nodes_from, context // PAGE_SIZE
                # a batch may be padded to a multiple of the ranks
                requests = rows + runner.server_args.tp_size
                in_turn = runner.server_args.pp_size > 1
                self.node_tables = NodeTables(
                    self.nodes, start, requests, pages, self._make_nodes, in_turn=in_turn
                )
        self.summaries = SummaryPool(
            self.token_to_kv_pool, self.layers, self.nodes.places if self.nodes else 0
        )
        self.trace = SelectionTrace(config.trace, runner.tp_rank) if config.trace else None
        self.telemetry: Telemetry | None = None
        self.totals: DecodeTotals | None = None
        if runner.server_args.enable_metrics and runner.tp_rank == 0:
            self.telemetry = Telemetry()
            self.totals = DecodeTotals(device) if self.captures else None
        self.passes = 0
        self.plan: ForwardPlan | None = None
        self.decode_plan: DecodePlan | None = None
        logger.info(
            "hip_attention: %s; summaries of %s pages = %.2f GiB",
            config.model_dump_json(),
            f"{self.summaries.pages:,}",
            self.summaries.nbytes / 2**30,
        )

    def support_triton(self) -> bool:
        return False

    def shared_read_ends(self, fm: ForwardMode) -> SharedReadEnds:
        # a plan copies what it needs of req_to_token; nothing reads that table later
        ends = SharedReadEnds.PRE_REPLAY
        if self.captures and fm.is_decode():
            ends = SharedReadEnds.IN_REPLAY
        if self.dense is not None:
            ends = SharedReadEnds.max_of((ends, self.dense.shared_read_ends(fm)))
        return ends

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        # a plan is made inside the graph, of its own memory
        if self.dense is not None and self._leaves_some_to_dense():
            self.dense.init_cuda_graph_state(max_bs, max_num_tokens)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        self._prepare(forward_batch)
        self._plan_steps(forward_batch)
        if self.dense is not None and self._leaves_some_to_dense():
            self.dense.init_forward_metadata(forward_batch)

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        if in_capture:
            # of nobody's requests
            self.plan = None
        else:
            self._prepare(forward_batch)
        if self.dense is not None and self._leaves_some_to_dense():
            self.dense.init_forward_metadata_out_graph(forward_batch, in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        self._plan_steps(forward_batch)
        if self.dense is not None and self._leaves_some_to_dense():
            self.dense.init_forward_metadata_in_graph(forward_batch)

    def _prepare(self, forward_batch: ForwardBatch) -> None:
        """What only the host can find out about a pass."""
        self.plan = self.decode_plan = None
        if forward_batch.forward_mode.is_idle():
            return
        if self.telemetry is not None and self.totals is not None:
            self.passes += 1
            if self.passes % PASSES_A_LOOK == 0:
                self.telemetry.observe_steps(self.totals)
                if self.config.offload is not None:
                    self.telemetry.observe_offload(self.token_to_kv_pool.traffic())
        if self.config.offload is not None:
            self.token_to_kv_pool.count_written(len(forward_batch.out_cache_loc))
        if not self._by_steps(forward_batch):
            if self.node_tables is not None:
                self.node_tables.forget()
            self.plan = ForwardPlan.of(
                forward_batch, self.req_to_token, self.config, self.nodes, self.cache
            )
        elif self.node_tables is not None:
            # padding comes last, and is shorter than any decode step
            lengths = [length for length in forward_batch.seq_lens_cpu.tolist() if length > 1]
            rows = forward_batch.req_pool_indices[: len(lengths)].long()
            self.node_tables.update(lengths, rows, self.req_to_token)

    def _plan_steps(self, forward_batch: ForwardBatch) -> None:
        """The plan of decode steps: no tensor is asked for a number."""
        if not self._by_steps(forward_batch):
            return
        self.plan, nodes = None, None
        if self.node_tables is not None:
            nodes = self.node_tables.of(forward_batch.batch_size)
        self.decode_plan = DecodePlan.of(
            forward_batch, self.req_to_token, self.config, self.cache, nodes
        )
        if self.nodes is not None:
            self.nodes.forget(self.decode_plan.completed)

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
        return self._forward("forward_decode", q, k, v, layer, forward_batch, save_kv_cache, kwargs)

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
        return self._forward("forward_extend", q, k, v, layer, forward_batch, save_kv_cache, kwargs)

    def _forward(
        self,
        phase: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
        others: dict[str, Any],
    ) -> Tensor:
        if given := [name for name, value in others.items() if value is not None]:
            raise ValueError(
                f"hip_attention does not support {', '.join(given)} in attention (layer "
                f"{layer.layer_id}); serve this model with another --attention-backend"
            )
        layer_plan = self.layers[layer.layer_id]
        if dense := self._leaves_to_dense(layer_plan):
            own = getattr(self.dense, phase)
            found: Tensor = own(q, k, v, layer, forward_batch, save_kv_cache)
        elif save_kv_cache and k is not None:
            loc = KVWriteLoc(forward_batch.out_cache_loc, None)
            self.token_to_kv_pool.set_kv_buffer(layer, loc, k, v, layer.k_scale, layer.v_scale)
        kv = self._stored(layer)
        if layer_plan.prunes:
            # before attending: later blocks of this very chunk prune pages that it completes
            self._summarize(kv, layer.layer_id)
        if not dense:
            query = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
            # rows of padding, where the batch has any, stay zero
            out = query.new_zeros(query.shape[0], layer.tp_q_head_num, layer.v_head_dim)
            pages_plan = layer_plan.pages
            if layer.logit_cap > 0:
                pages_plan = replace(pages_plan, logit_cap=layer.logit_cap)
            by = self._attend_blocks if self.decode_plan is None else self._attend_steps
            by(layer, layer_plan, pages_plan, query, kv, out)
            found = out.flatten(1)
        if self.telemetry is not None:
            self._count(self.telemetry, layer.layer_id, layer_plan, dense)
        return found

    def _stored(self, layer: RadixAttention) -> StoredKV:
        """What the pool holds of a layer."""
        pool = self.token_to_kv_pool
        scales = stored_scales(layer, pool.dtype)
        if self.config.offload is not None:
            return pool.kv(layer.layer_id, *scales)  # type: ignore[no-any-return]
        key, value = pool.get_kv_buffer(layer.layer_id)
        return PagedKV(key, value, *scales)

    def _count(
        self, telemetry: Telemetry, layer_id: int, layer_plan: LayerPlan, dense: bool
    ) -> None:
        """What the pass did in this layer, so far as it is not counted yet."""
        if self.plan is not None and dense:
            for blocks in self.plan.blocks(layer_plan):
                telemetry.observe(blocks, None)
        if layer_id != self.last_layer:
            return
        if self.decode_plan is None:
            telemetry.flush()
            if self.config.offload is not None:
                telemetry.observe_offload(self.token_to_kv_pool.traffic())
        elif self.totals is not None:
            pruning = [plan for plan in self.layers.values() if plan.sparse_decode_from is not None]
            some = (pruning or [layer_plan])[0]
            self.totals.end_pass(self.decode_plan.of_layer(some), len(self.layers), some.pages)

    def _by_steps(self, forward_batch: ForwardBatch) -> bool:
        return self.captures and bool(forward_batch.forward_mode.is_decode())

    def _leaves_some_to_dense(self) -> bool:
        return any(map(self._leaves_to_dense, self.layers.values()))

    def _leaves_to_dense(self, layer_plan: LayerPlan) -> bool:
        """Whether a layer leaves this pass to SGLang's own backend."""
        if self.dense is None:
            return False
        if self.plan is None:
            return layer_plan.sparse_decode_from is None
        return not self.plan.prunes(layer_plan)

    def _summarize(self, kv: StoredKV, layer_id: int) -> None:
        """The pages that this pass completes, and the nodes that it makes."""
        summaries = self.summaries.pages_of(layer_id)
        if self.decode_plan is not None:
            summarize(kv, self.decode_plan.completed, summaries)
        elif self.plan is not None:
            summarize(kv, self.plan.completed, summaries)
            if self.plan.nodes is not None:
                self._make_nodes_of(layer_id, self.plan.nodes)

    def _make_nodes(self, plan: NodePlan) -> None:
        for layer_id, layer_plan in self.layers.items():
            if layer_plan.prunes:
                self._make_nodes_of(layer_id, plan)

    def _make_nodes_of(self, layer_id: int, plan: NodePlan) -> None:
        pages, nodes = self.summaries.pages_of(layer_id), self.summaries.nodes_of(layer_id)
        pool(pages, plan.new_pages, plan.new_places, nodes)

    def _attend_steps(
        self,
        layer: RadixAttention,
        layer_plan: LayerPlan,
        pages_plan: SparsePlan,
        query: Tensor,
        kv: StoredKV,
        out: Tensor,
    ) -> None:
        """A pass of decode steps, in launches that are always the same."""
        assert self.decode_plan is not None
        steps, heads = self.decode_plan.of_layer(layer_plan), kv.kv_heads
        shape = heads, query.shape[1] // heads
        if self.cache is not None:
            choice = self.cache.all_rows(layer.layer_id, *shape)
        else:
            choice = Choice.empty(len(steps), *shape, pages_plan, query.device)
        estimated = query.new_empty(len(steps), query.shape[1], dtype=torch.float32)
        summaries = self.summaries.pages_of(layer.layer_id)
        nodes = self.summaries.nodes_of(layer.layer_id)
        attend_steps(
            query, kv, summaries, steps, choice, pages_plan, layer.scaling, out, estimated, nodes
        )
        if self.totals is not None and layer_plan.sparse_decode_from is not None:
            self.totals.add(steps, choice, estimated, pages_plan)

    def _attend_blocks(
        self,
        layer: RadixAttention,
        layer_plan: LayerPlan,
        pages_plan: SparsePlan,
        query: Tensor,
        kv: StoredKV,
        out: Tensor,
    ) -> None:
        """Any pass, one kind of query blocks after the other."""
        plan = self.plan
        assert plan is not None
        summaries = self.summaries.pages_of(layer.layer_id)
        nodes = self.summaries.nodes_of(layer.layer_id)
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


def stored_scales(layer: RadixAttention, dtype: torch.dtype) -> tuple[float, float]:
    """What stored keys and values are to be multiplied by; SGLang divides only what it casts."""
    if dtype.itemsize > 1:
        return 1.0, 1.0
    return (
        1.0 if layer.k_scale is None else layer.k_scale_float,
        1.0 if layer.v_scale is None else layer.v_scale_float,
    )
