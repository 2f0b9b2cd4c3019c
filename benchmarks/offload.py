"""What does a device that holds an eighth of the KV cost, and how much does it hold?

The built-in model on the real server, decoding behind a document of Python's library: KV in host
memory against all of it resident, the same configuration otherwise, in turn. Then what a rank of
Llama-3.1-8B's shape keeps on the device at 128K tokens when its cache has room for 1/32 of them:
cache, summaries and tables by the plan that a server makes, scratch as one decode step takes it.
"""

from __future__ import annotations

import json
import os
import sys
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import torch
from hip_kernels.layout import PAGE_SIZE, Summaries
from hip_kernels.offloaded import OffloadedKV
from hip_kernels.ops import attend, plan_blocks
from hip_kernels.page_cache import HostPages, PageCache
from torch.utils._python_dispatch import TorchDispatchMode

from hip_sglang.config import HipConfig
from hip_sglang.demo.model import write_model
from hip_sglang.demo.offload import sized_offload, token_bytes_of
from hip_sglang.demo.server import serve, unwind_on_signals
from hip_sglang.kv.memory import KVShape, MemoryPlan

from .arguments import Parser, at_least
from .rows import percentiles, save
from .serve import CHUNK, HIP, SPARE, TUNING, Contestant, Prompts, Samples, workspace

# Llama-3.1-8B: query heads, and its KV
QUERY_HEADS, SHAPE = 32, {"layers": 32, "kv_heads": 8, "head_dim": 128, "value_dim": 128}
LONG, SHARE_OF_LONG = 131072, 32


def run(
    config: dict[str, Any], prompts: Prompts, model: Path, folder: Path, rounds: int, share: int
) -> tuple[Samples, dict[str, list[float]]]:
    """Speeds by name, and what the offloaded server's counters say of its decode steps."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(TUNING)}
    offload = sized_offload(token_bytes_of(model), prompts.context, SPARE, share)
    ways = {"resident": config, "offloaded": {**config, "offload": offload}}
    with ExitStack() as stack:
        contestants = {}
        for name, hip in ways.items():
            arguments = (
                *("--model-path", str(model)),
                *("--context-length", str(prompts.context)),
                *("--max-total-tokens", str(prompts.context + SPARE)),
                *("--sleep-on-idle", "--enable-metrics"),
                *(*HIP, "--hip-config", json.dumps(hip)),
            )
            server = serve(arguments, folder / f"{name}.log", environment)
            contestants[name] = Contestant(stack.enter_context(server).url, prompts)
        found: Samples = {name: [] for name in ways}
        traffic: dict[str, list[float]] = {"hit_ratio": [], "bytes_per_token": []}
        order = list(ways)
        for number in range(1, rounds + 1):
            for name in order:
                speed = contestants[name].measure()
                found[name].append(speed)
                print(
                    f"round {number}, {name}: first token after {speed.ttft_s:.2f} s, then "
                    f"{speed.decode_tokens_per_s:.1f} tokens/s",
                    flush=True,
                )
            for name, value in decode_traffic(contestants["offloaded"], prompts).items():
                traffic[name].append(value)
            order.reverse()
    return found, traffic


def decode_traffic(server: Contestant, prompts: Prompts) -> dict[str, float]:
    """Of decode steps behind a document that is in host memory already."""
    before = counters(server.url)
    sampling = {"max_new_tokens": prompts.new, "temperature": 0, "ignore_eos": True}
    body = {"text": prompts.document.text + prompts.suffix, "sampling_params": sampling}
    httpx.post(f"{server.url}/generate", json=body, timeout=600).raise_for_status()
    moved = {name: value - before[name] for name, value in counters(server.url).items()}
    return {
        "hit_ratio": moved["held_pages_total"] / max(1.0, moved["chosen_pages_total"]),
        "bytes_per_token": moved["fetched_bytes_total"] / prompts.new,
    }


def counters(url: str, prefix: str = "hip_sglang_offload_") -> dict[str, float]:
    """What a server's metrics say whose names begin so; without that beginning."""
    lines = httpx.get(f"{url}/metrics", timeout=60).raise_for_status().text.splitlines()
    found = (line.rpartition(" ") for line in lines if line.startswith(prefix))
    return {name.removeprefix(prefix): float(value) for name, _, value in found}


class Scratch(TorchDispatchMode):
    """The most bytes of tensors that are alive together, of those made inside."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        # a view of what was there is not made here
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
        return found

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        where = storage.data_ptr()
        if where in self.alive or where in self.known:
            return
        self.alive[where] = storage.nbytes()
        self.most = max(self.most, sum(self.alive.values()))
        weakref.finalize(storage, self.alive.pop, where, None)


def device_share(itemsize: int) -> dict[str, float]:
    """What a device keeps of KV of so many bytes a number, as shares of all of it."""
    # one query reads no more than what the cache has room for
    config = HipConfig.load(
        {
            "dense_threshold": 0,
            "offload": {
                "host_gib": 1.0,
                "device_tokens": LONG // SHARE_OF_LONG,
            },
        }
    )
    shape = KVShape(itemsize=itemsize, **SHAPE)
    host = (LONG + PAGE_SIZE) * shape.token_bytes
    plan = MemoryPlan.of(shape, config, host_bytes=host, context=LONG, running=1, device_bytes=None)
    everything = LONG * shape.token_bytes
    parts = {
        "cache": plan.cache_bytes,
        "summaries": plan.summary_bytes,
        "tables": plan.table_bytes,
        # one layer's, which the next one uses again
        "scratch": scratch_bytes(config, itemsize),
    }
    found = {name: size / everything for name, size in parts.items()}
    return {"all": sum(found.values()), **found}


def scratch_bytes(config: HipConfig, itemsize: int) -> int:
    """Of one decode step at 128K tokens, all pages missing."""
    heads, width, pages = SHAPE["kv_heads"], SHAPE["head_dim"], LONG // PAGE_SIZE
    dtype = {4: torch.float32, 2: torch.bfloat16}[itemsize]
    host = HostPages.empty(pages, heads, width, width, dtype)
    cache = PageCache.empty(pages // SHARE_OF_LONG, host, "cpu")
    half = torch.float32 if itemsize == 4 else torch.float16
    summaries = Summaries.empty(pages, heads, width, width, dtype=half)
    plan = config.layer_plan(0)
    (blocks,) = plan_blocks(
        [LONG - 1], [LONG], torch.arange(pages)[None],
        sparse_from=plan.sparse_from, sparse_decode_from=plan.sparse_decode_from,
    )  # fmt: skip
    query = torch.randn(1, QUERY_HEADS, width).to(dtype)
    out = torch.empty_like(query)
    known = (host.rows, *vars(cache).values(), *summaries.tensors, query, out, blocks.table)
    with Scratch(*known) as scratch:
        attend(query, OffloadedKV(host, cache, dtype), summaries, blocks, plan.pages, 0.1, out)
    return scratch.most


def main(argv: list[str]) -> int:
    parser = Parser("offload", __doc__)
    parser.add_argument("--context", type=int, default=65536, help="tokens, the new ones included")
    parser.add_argument("--new", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--share", type=int, default=8, help="the device holds 1/SHARE of them")
    parser.add_output()
    args = parser.parse_args(argv)
    at_least(1, rounds=args.rounds)
    at_least(2, new=args.new, share=args.share)
    at_least(CHUNK, context=args.context)
    least = HipConfig().step_pages * PAGE_SIZE
    if args.context // args.share < least:
        raise ValueError(
            f"--share {args.share} of --context {args.context} is less than the {least:,} tokens "
            "that one query may read; give a longer context"
        )
    config: dict[str, Any] = {"second_look": 0}
    with unwind_on_signals(), workspace() as folder:
        model = folder / "model"
        write_model(model)
        prompts = Prompts.make(model, args.context, args.new)
        samples, traffic = run(config, prompts, model, folder, args.rounds, args.share)
    shares = {name: device_share(size) for name, size in (("float32", 4), ("bfloat16", 2))}
    shape = {
        "context": args.context, "new": args.new, "rounds": args.rounds, "share": args.share,
        "model": "built-in", "hip": config, "device_share_of": {**SHAPE, "context": LONG},
    }  # fmt: skip
    report(shape, samples, traffic, shares, as_json=args.json, keep=args.save)
    return 0


def report(
    shape: dict[str, Any],
    samples: Samples,
    traffic: dict[str, list[float]],
    shares: dict[str, dict[str, float]],
    *,
    as_json: bool,
    keep: bool,
) -> None:
    """Print medians over rounds, and keep the rows."""
    pairs = list(zip(samples["offloaded"], samples["resident"], strict=True))
    rows = {
        "ratio.decode_vs_resident": (
            "x",
            [ours.decode_tokens_per_s / other.decode_tokens_per_s for ours, other in pairs],
        ),
        "ratio.ttft_vs_resident": ("x", [other.ttft_s / ours.ttft_s for ours, other in pairs]),
        "hit_ratio": ("share", traffic["hit_ratio"]),
        "bytes_per_token": ("B", traffic["bytes_per_token"]),
        "stall_per_step": (
            "ms",
            [
                1000 * (1 / ours.decode_tokens_per_s - 1 / other.decode_tokens_per_s)
                for ours, other in pairs
            ],
        ),
    }
    for dtype, parts in shares.items():
        rows |= {f"device_bytes_share.{dtype}.{of}": ("share", [v]) for of, v in parts.items()}
    middle = {metric: percentiles(found)[1] for metric, (_, found) in rows.items()}
    for metric, (unit, found) in rows.items():
        low, _, high = percentiles(found)
        print(f"{metric:38s} {middle[metric]:12.4g} {unit}   (p20 {low:.4g}, p80 {high:.4g})")
    if keep:
        print(f"saved to {save('offload', shape, rows).name}", file=sys.stderr)
    if as_json:
        ratios = {
            name.removeprefix("ratio."): round(value, 3)
            for name, value in middle.items()
            if name.startswith("ratio.")
        }
        values = {
            "hit_ratio": round(middle["hit_ratio"], 4),
            "bytes_per_token": round(middle["bytes_per_token"]),
            "stall_ms_per_step": round(middle["stall_per_step"], 3),
            "device_bytes_share": round(shares["float32"]["all"], 4),
            "device_bytes_share_bfloat16": round(shares["bfloat16"]["all"], 4),
        }
        print(json.dumps({"bench": "offload", "config": shape, "ratios": ratios, "values": values}))
