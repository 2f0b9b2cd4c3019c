"""How fast is one layer's attention, against the strongest dense attention of the machine?

Decode: one query token over a cached context. Prefill: the last chunk of a context. Our keep-all
is the same code with nothing pruned; the best dense one reads contiguous keys and values, which
no paged server has. All are timed in turn, round by round, each round with queries of its own.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import psutil
import torch
from hip_kernels.layout import NODE_PAGES, PAGE_SIZE, Summaries
from hip_kernels.ops import attend, plan_blocks, pool, summarize
from hip_kernels.stored import PagedKV
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hip_sglang.config import HipConfig, LayerPlan
from hip_sglang.runtime.host_platform import settle_environment

from .arguments import Parser, at_least, given_of
from .rows import percentiles, save


@dataclass
class Case:
    """One layer's state at the end of a context."""

    kv: PagedKV
    summaries: Summaries
    nodes: Summaries
    page_table: Tensor  # [1, P]
    context: int
    rows: int  # query tokens
    query_heads: int

    @classmethod
    def make(cls, context: int, rows: int, heads: tuple[int, int], dim: int, means: int) -> Case:
        """Random keys that drift, so that pages differ and a budget has something to choose."""
        query_heads, kv_heads = heads
        slots = -(-context // PAGE_SIZE) * PAGE_SIZE
        generator = torch.Generator().manual_seed(0)
        topics = torch.randn(slots // PAGE_SIZE, 1, kv_heads, dim, generator=generator)
        kv = PagedKV(
            torch.randn(slots // PAGE_SIZE, PAGE_SIZE, kv_heads, dim, generator=generator)
            .add_(topics)
            .flatten(0, 1),
            torch.randn(slots, kv_heads, dim, generator=generator),
        )
        return cls.of(kv, context, rows, query_heads, means)

    @classmethod
    def of(cls, kv: PagedKV, context: int, rows: int, query_heads: int, means: int) -> Case:
        """The pages of ``kv`` in their order, of which ``context`` tokens are written."""
        slots, kv_heads, width = kv.key.shape
        pages = torch.arange(slots // PAGE_SIZE)

        shape = kv_heads, width, kv.value.shape[2]
        complete = context // PAGE_SIZE
        summaries = Summaries.empty(len(pages), *shape, means=means)
        nodes = Summaries.empty(complete // NODE_PAGES, *shape, means=1)
        case = cls(kv, summaries, nodes, pages[None], context, rows, query_heads)
        case.summarize(0, complete)
        return case

    def summarize(self, first: int, end: int) -> None:
        """The pages from ``first`` to before ``end``, and the nodes that these complete."""
        for some in torch.arange(first, end).split(256):
            summarize(self.kv, some, self.summaries)
        of_node = torch.arange(NODE_PAGES)
        for some in torch.arange(first // NODE_PAGES, end // NODE_PAGES).split(32):
            pool(self.summaries, some[:, None] * NODE_PAGES + of_node, some, self.nodes)

    def queries(self, seed: int) -> Tensor:
        """[rows, Hq, D], scaled so that attention is neither uniform nor a single token."""
        shape = (self.rows, self.query_heads, self.kv.key.shape[2])
        return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(1000 + seed))

    def ours(self, plan: LayerPlan) -> Callable[[Tensor], Tensor]:
        blocks = plan_blocks(
            [self.context - self.rows],
            [self.context],
            self.page_table,
            sparse_from=plan.sparse_from,
            sparse_decode_from=plan.sparse_decode_from,
            nodes_from=plan.nodes_from,
            node_table=torch.arange(self.nodes.pages)[None],
        )

        def run(query: Tensor) -> Tensor:
            out = torch.zeros_like(query)
            for block in blocks:
                scale = query.shape[2] ** -0.5
                attend(query, self.kv, self.summaries, block, plan.pages, scale, out, self.nodes)
            return out

        return run

    def torch_native(self) -> Callable[[Tensor], Tensor]:
        """SGLang's own backend of that name, on SGLang's pool layout; decode steps only."""
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

        backend = object.__new__(TorchNativeAttnBackend)
        req_to_token = torch.arange(self.context, dtype=torch.int32)[None]
        first, length = torch.zeros(1, dtype=torch.int64), torch.tensor([self.context])

        def run(query: Tensor) -> Tensor:
            out = torch.empty_like(query)
            backend._run_sdpa_forward_decode(
                query, out, self.kv.key, self.kv.value, req_to_token, first, length,
                scaling=query.shape[2] ** -0.5,
                enable_gqa=query.shape[1] != self.kv.kv_heads,
            )  # fmt: skip
            return out

        return run

    def dense(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Two dense attentions over contiguous memory; the better one is the baseline.

        A KV head at a time, so that its keys are read once for all query heads of its group.
        """
        key, value = (
            x[: self.context].transpose(0, 1).contiguous() for x in (self.kv.key, self.kv.value)
        )  # [Hkv, T, D]
        heads = len(key)
        # only the chunk's own keys can lie in a query's future
        chunk = torch.full((self.rows, self.rows), float("-inf")).triu_(1)
        mask = torch.zeros(self.rows, self.context)
        mask[:, -self.rows :] = chunk

        def grouped(query: Tensor) -> Tensor:  # [Hkv, G, rows, D]
            return query.view(self.rows, heads, -1, query.shape[2]).permute(1, 2, 0, 3)

        def back(out: Tensor) -> Tensor:
            return out.permute(2, 0, 1, 3).flatten(1, 2)

        def bmm(query: Tensor) -> Tensor:
            q = grouped(query) * query.shape[2] ** -0.5
            if self.rows == 1:
                return back(((q[:, :, 0] @ key.mT).softmax(-1) @ value).unsqueeze(2))
            out = torch.empty(q.shape)
            for head, group in product(range(heads), range(q.shape[1])):
                logits = q[head, group] @ key[head].T
                logits[:, -self.rows :] += chunk
                out[head, group] = logits.softmax(-1) @ value[head]
            return back(out)

        def sdpa(query: Tensor) -> Tensor:
            q = grouped(query)
            if self.rows == 1:
                q = q.transpose(1, 2)  # [Hkv, 1, G, D]
                out = scaled_dot_product_attention(q, key[:, None], value[:, None])
                return back(out.transpose(1, 2))
            of_group = (-1, q.shape[1], -1, -1)
            k, v = (x[:, None].expand(of_group) for x in (key, value))
            return back(
                torch.cat(
                    [
                        scaled_dot_product_attention(*(x[head, None] for x in (q, k, v)), mask)
                        for head in range(heads)
                    ]
                )
            )

        return {"dense_bmm": bmm, "dense_sdpa": sdpa}


def measure(case: Case, config: HipConfig, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant, round by round."""
    contestants = {
        "ours": case.ours(config.layer_plan(0)),
        "keep_all": case.ours(HipConfig.load(None, "dense").layer_plan(0)),
        **case.dense(),
    }
    # in an extend it computes every row of the context again; in a step it copies all of the KV
    if case.rows == 1 and psutil.virtual_memory().available > 1.25 * case.kv.nbytes:
        contestants["torch_native"] = case.torch_native()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds):
        before, query = case.queries(2 * turn), case.queries(2 * turn + 1)
        for name, run in contestants.items():
            # in a server a step follows another step, not another contestant's mess
            run(before)
            start = time.perf_counter()
            run(query)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main(argv: list[str]) -> int:
    parser = Parser("attention", __doc__)
    parser.add_argument("--mode", choices=["decode", "prefill"], default="decode")
    parser.add_argument("--context", type=int, default=131072, help="tokens")
    parser.add_argument("--chunk", type=int, default=1024, help="query tokens of a prefill")
    parser.add_argument("--heads", default="32/8", help="query heads / KV heads")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--hip-config", help="JSON text or a path")
    parser.add_output()
    args = parser.parse_args(argv)
    query_heads, _, kv_heads = args.heads.partition("/")
    try:
        heads = (int(query_heads), int(kv_heads or query_heads))
    except ValueError:
        raise ValueError(f"--heads {args.heads}: give query heads / KV heads, as 32/8") from None
    if heads[1] < 1 or heads[0] % heads[1]:
        raise ValueError(f"--heads {args.heads}: the query heads must be a multiple of the others")
    at_least(1, rounds=args.rounds)
    rows = 1 if args.mode == "decode" else args.chunk
    if not 0 < rows <= args.context:
        raise ValueError(f"--chunk {rows} must lie between 1 and --context {args.context}")
    config = HipConfig.load(args.hip_config)
    settle_environment()  # as the server on a CPU does
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang's, about quantizations that a CPU has not
        case = Case.make(args.context, rows, heads, args.dim, config.layer_plan(0).means)
        seconds = measure(case, config, args.rounds)

    def ratios(*others: str) -> list[float]:
        """How many times faster we are, in each round, than the best of the others."""
        best = min(others, key=lambda name: percentiles(seconds[name])[1])
        return [other / ours for other, ours in zip(seconds[best], seconds["ours"], strict=True)]

    found = {
        "vs_best_dense": ratios("dense_bmm", "dense_sdpa"),
        "vs_keep_all": ratios("keep_all"),
    }
    if "torch_native" in seconds:
        found["vs_torch_native"] = ratios("torch_native")
    elif rows == 1:
        print("torch_native is left out: it copies the KV, for which memory is too short")
    for name, samples in seconds.items():
        p20, p50, p80 = (1e3 * value for value in percentiles(samples))
        print(f"{name:14s} {p50:9.2f} ms   (p20 {p20:.2f}, p80 {p80:.2f})")
    for name, samples in found.items():
        print(f"{name:16s} {percentiles(samples)[1]:6.1f}x")
    shape = {
        "mode": args.mode, "context": args.context, "rows": rows, "heads": args.heads,
        "dim": args.dim, "hip": given_of(config),
    }  # fmt: skip
    if args.save:
        rows_of = {f"ratio.{name}": ("x", samples) for name, samples in found.items()}
        rows_of |= {name: ("s", samples) for name, samples in seconds.items()}
        print(f"saved to {save('attention', shape, rows_of).name}", file=sys.stderr)
    if args.json:
        medians = {name: round(percentiles(samples)[1], 2) for name, samples in found.items()}
        values = {f"{name}_ms": round(1e3 * percentiles(s)[1], 3) for name, s in seconds.items()}
        print(
            json.dumps({"bench": "attention", "config": shape, "ratios": medians, "values": values})
        )
    return 0
