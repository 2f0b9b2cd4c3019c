"""How does the cost of attention grow with the context?

One layer, as in `bench attention`: a decode step, and the last chunk of a prompt, at each length in
turn, round by round. An exponent is the slope of log seconds over log tokens; a whole prompt costs
the sum of its chunks, so its exponent is one more than that of its last chunk.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np

from hip_sglang.config import HipConfig
from hip_sglang.explain import parse_lengths
from hip_sglang.runtime.host_platform import settle_environment

from .arguments import Parser, at_least
from .attention import Case
from .rows import percentiles, save


def seconds(
    lengths: list[int], rows: int, heads: tuple[int, int], dim: int, rounds: int
) -> dict[int, list[float]]:
    """Of attending so many query rows at the end of each context."""
    plan = HipConfig().layer_plan(0)
    cases = {length: Case.make(length, rows, heads, dim, plan.means) for length in lengths}
    attends = {length: case.ours(plan) for length, case in cases.items()}
    found: dict[int, list[float]] = {length: [] for length in lengths}
    for turn in range(rounds):
        for length, attend in attends.items():
            before, query = (cases[length].queries(2 * turn + n) for n in range(2))
            attend(before)
            began = time.perf_counter()
            attend(query)
            found[length].append(time.perf_counter() - began)
    return found


def exponent(samples: dict[int, list[float]]) -> float:
    """Of the power of the length that the medians follow."""
    medians = [percentiles(of)[1] for of in samples.values()]
    slope, _ = np.polyfit(np.log(list(samples)), np.log(medians), 1)
    return float(slope)


def main(argv: list[str]) -> int:
    parser = Parser("growth", __doc__)
    parser.add_argument("--lengths", default="128K,256K,512K,1M", help="tokens, of decode steps")
    parser.add_argument("--prompts", default="128K,256K,512K,1M", help="tokens, of prompts")
    parser.add_argument("--chunk", type=int, default=256, help="query tokens of a prompt's chunk")
    parser.add_argument("--kv-heads", type=int, default=2, help="with four query heads each")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_output()
    args = parser.parse_args(argv)
    at_least(1, rounds=args.rounds, kv_heads=args.kv_heads, chunk=args.chunk)
    at_least(16, dim=args.dim)
    settle_environment()
    heads = 4 * args.kv_heads, args.kv_heads
    shape = {"heads": f"{heads[0]}/{heads[1]}", "dim": args.dim, "rounds": args.rounds}
    rows: dict[str, tuple[str, list[float]]] = {}
    for mode, text, count in (("decode", args.lengths, 1), ("prefill", args.prompts, args.chunk)):
        lengths = parse_lengths(text)
        if len(lengths) < 2 or lengths[0] <= count:
            raise ValueError(f"{text}: give two lengths or more, each longer than {count} tokens")
        found = seconds(lengths, count, heads, args.dim, args.rounds)
        for length, of in found.items():
            rows[f"{mode}.{length}"] = ("ms", [1000 * one for one in of])
            print(f"{mode:8s} {length:>10,} tokens {1000 * percentiles(of)[1]:10.2f} ms")
        slope = exponent(found) + (mode == "prefill")
        rows[f"exponent.{mode}"] = ("", [slope])
        print(f"{mode:8s} grows with the context to the power of {slope:.2f}", flush=True)
        shape[mode] = lengths
    if args.save:
        print(f"saved to {save('growth', shape, rows).name}", file=sys.stderr)
    if args.json:
        values = {name: round(percentiles(of)[1], 4) for name, (_, of) in rows.items()}
        print(json.dumps({"bench": "growth", "config": shape, "values": values}))
    return 0
