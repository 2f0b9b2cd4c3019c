"""How soon does a server go on from a prefix that it has read before, and what does keeping cost?

The built-in model on the real server, its KV in host memory, of which the device holds an eighth.
One document of Python's library is read cold, asked for again while the tree knows it, and asked
for again after the server was ended and started anew on the same disk. A second server keeps
nothing, is not started anew, reads the same, and is asked in turn: what writing behind costs.
The document ends with a page, so that a known prefix leaves one token to compute. Each round is a
namespace of its own, in which nothing is known. Then, in this process, what the tree itself takes
when it holds ten thousand prefixes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from hip_kernels.layout import PAGE_SIZE

from hip_sglang.demo.model import write_model
from hip_sglang.demo.offload import sized_offload, token_bytes_of
from hip_sglang.demo.program import Timed, ask_alone
from hip_sglang.demo.server import serve, unwind_on_signals
from hip_sglang.demo.vocabulary import load_tokenizer

from .arguments import Parser, at_least
from .offload import counters
from .retrieval import library_document
from .rows import percentiles, save
from .serve import CHUNK, HIP, SPARE, TUNING, workspace

SHARE = 8  # the device holds one in so many tokens
# seconds that one thread was busy with it, of this server's life
WRITING = 'hip_sglang_disk_seconds_total{kind="written"}'
PREFIXES = 10_000  # in the tree whose operations are timed


def run(model: Path, folder: Path, ids: list[int], new: int, rounds: int) -> dict[str, list[float]]:
    """Samples by metric, one a round."""
    offload = sized_offload(token_bytes_of(model), len(ids), SPARE, SHARE)
    # pages and their summaries, of each round's namespace and what is first done
    disk = {"path": str(folder / "disk"), "gib": 2 * (rounds + 1) * offload["host_gib"]}
    ways = {"without": offload, "kept": {**offload, "disk": disk}}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(TUNING)}

    @contextmanager
    def started(name: str) -> Iterator[str]:
        arguments = (
            *("--model-path", str(model)),
            *("--context-length", str(len(ids) + SPARE)),
            *("--sleep-on-idle", "--enable-metrics"),
            *(*HIP, "--hip-config", json.dumps({"offload": ways[name]})),
        )
        with serve(arguments, folder / f"{name}.log", environment) as server:
            # what is first done takes longer
            ask_alone(server.url, ids[: 3 * CHUNK], 4, "warm")
            yield server.url

    found: dict[str, list[float]] = {}
    for number in range(rounds):
        namespace = f"round {number}"
        cold = {}
        with started("without") as without, started("kept") as kept:
            both = [("without", without), ("kept", kept)]
            for name, url in both if number % 2 else reversed(both):
                cold[name] = ask_alone(url, ids, 1, namespace)
            before = counters(kept)["fetched_bytes_total"]
            known = ask_alone(kept, ids, 1, namespace)
            fetched = counters(kept)["fetched_bytes_total"] - before
            step = ask_alone(kept, ids, new, namespace).step_s
            writing = counters(kept, WRITING)[""]
        with started("kept") as kept:
            again = ask_alone(kept, ids, 1, namespace)
        for metric, value in {
            "cold.ttft": cold["kept"].ttft_s,
            "known.ttft": known.ttft_s,
            "restarted.ttft": again.ttft_s,
            "decode.step": step,
            "ratio.known_vs_step": known.ttft_s / step,
            # without the door: 64K tokens are JSON first
            "ratio.known_pass_vs_step": passed(known) / step,
            "ratio.restarted_vs_cold": again.ttft_s / cold["kept"].ttft_s,
            "ratio.writing_vs_cold": writing / cold["kept"].ttft_s,
            "ratio.reading_vs_without_disk": cold["without"].ttft_s / cold["kept"].ttft_s,
            "fetched_bytes": fetched,
            "known.tokens": known.cached_tokens,
            "restarted.tokens": again.cached_tokens,
        }.items():
            found.setdefault(metric, []).append(value)
        print(
            f"round {number + 1}: first token after {cold['kept'].ttft_s:.2f} s cold, "
            f"{known.ttft_s:.3f} s known, {again.ttft_s:.3f} s after a restart; a step takes "
            f"{1000 * step:.1f} ms",
            flush=True,
        )
    return found


def passed(answer: Timed) -> float:
    """Seconds from the scheduler's taking a request up to its first token."""
    return float(answer.meta["prefill_finished_time"] - answer.meta["forward_entry_time"])


def tree_seconds(prefixes: int = PREFIXES) -> list[float]:
    """What finding a prefix and adding a page to it takes in a tree of so many prefixes.

    They share their first page by the hundred, and have two more of their own.
    """
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.mem_cache.unified_cache.components import ComponentType

    from hip_sglang.kv.pool import OffloadedKVPool
    from hip_sglang.kv.radix import HipRadixCache

    size = 4 * prefixes * PAGE_SIZE
    common = {"dtype": torch.float32, "device": "cpu"}
    pool = OffloadedKVPool(
        size, head_num=1, head_dim=8, v_head_dim=8, layer_num=1, start_layer=0, end_layer=0,
        device_tokens=PAGE_SIZE, miss_policy="fetch", **common,
    )  # fmt: skip
    allocator = PagedTokenToKVPoolAllocator(
        size, PAGE_SIZE, kvcache=pool, need_sort=False, **common
    )
    params = CacheInitParams(False, None, allocator, PAGE_SIZE)  # type: ignore[arg-type]
    params.tree_components = (ComponentType.FULL,)
    tree = HipRadixCache(params)

    def key(number: int, pages: int) -> RadixKey:
        ids = [1 + number // 100] * PAGE_SIZE + [200 + number] * ((pages - 1) * PAGE_SIZE)
        return RadixKey(array("q", ids))

    def insert(of: RadixKey, known: int) -> None:
        fresh = allocator.alloc(len(of) - known)
        found = tree.match_prefix(MatchPrefixParams(key=of)).device_indices[:known]
        value = torch.cat([found, fresh])
        tree.insert(InsertParams(key=of, value=value, prev_prefix_len=known))

    for number in range(prefixes):
        insert(key(number, 3), 0 if number % 100 == 0 else PAGE_SIZE)
    taken = []
    for number in range(0, prefixes, max(1, prefixes // 200)):
        longer = key(number, 4)
        began = time.perf_counter()
        insert(longer, 3 * PAGE_SIZE)
        taken.append(time.perf_counter() - began)
    return taken


UNITS = {"ttft": "s", "step": "s", "tokens": "tokens", "fetched_bytes": "B"}


def main(argv: list[str]) -> int:
    parser = Parser("prefix", __doc__)
    parser.add_argument("--context", type=int, default=65536, help="tokens of the document")
    parser.add_argument("--new", type=int, default=64, help="tokens that say how long a step takes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_output()
    args = parser.parse_args(argv)
    at_least(1, rounds=args.rounds)
    at_least(2, new=args.new)
    at_least(CHUNK, context=args.context)
    with unwind_on_signals(), workspace() as folder:
        model = folder / "model"
        write_model(model)
        document = library_document(load_tokenizer(model), args.context)
        whole = len(document.ids) // PAGE_SIZE * PAGE_SIZE
        # the last token is computed, and its page with it
        samples = run(
            model, folder, [*document.ids[:whole], document.ids[0]], args.new, args.rounds
        )
    # against the step of the same run
    step = percentiles(samples["decode.step"])[1]
    samples["tree.step"] = tree_seconds()
    samples["ratio.tree_vs_step"] = [seconds / step for seconds in samples["tree.step"]]
    shape = {
        "context": args.context, "new": args.new, "rounds": args.rounds, "share": SHARE,
        "model": "built-in",
    }  # fmt: skip
    rows = {
        metric: ("x" if metric.startswith("ratio.") else UNITS[metric.rpartition(".")[2]], values)
        for metric, values in samples.items()
    }
    middle = {metric: percentiles(values)[1] for metric, values in samples.items()}
    for metric, (unit, values) in rows.items():
        low, _, high = percentiles(values)
        print(f"{metric:32s} {middle[metric]:12.4g} {unit}   (p20 {low:.4g}, p80 {high:.4g})")
    if args.save:
        print(f"saved to {save('prefix', shape, rows).name}", file=sys.stderr)
    if args.json:
        ratios = {
            name.removeprefix("ratio."): round(value, 4)
            for name, value in middle.items()
            if name.startswith("ratio.")
        }
        values = {name: value for name, value in middle.items() if not name.startswith("ratio.")}
        print(json.dumps({"bench": "prefix", "config": shape, "ratios": ratios, "values": values}))
    return 0
