"""How near to dense attention is the output, and does a model still say the right thing?

Synthetic: the relative L2 error of one decode step against dense, at equal budget: ours, HiP as
published (paper), the truly best tokens (oracle) and sink and window alone (stream). With
--model: the built-in retrieval model continues quotes from a document, token by token with the
right past given, under each configuration, InfiniteHiP's stages with as many tokens as the first
of them, and under keep-all.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from hip_kernels.layout import PAGE_SIZE
from hip_kernels.stored import PagedKV

from hip_sglang.config import HipConfig, LayerPlan
from hip_sglang.demo.architecture import OFFSETS

from .arguments import Parser, at_least, given_of
from .attention import Case
from .kept import METHODS, Kept, Sizes
from .retrieval import MAX_CONTEXT, MIN_CONTEXT, Task, right_tokens
from .rows import save
from .synthetic import GENERATORS, LENGTH, SHORTEST, TOPIC, Context

KEEP_ALL, INFINITE = "keep_all", "InfiniteHiP"
DEFAULT_CONFIGS = (None, '{"preset": "paper"}', '{"remainder": "log_cosh"}')


def errors(context: Context, plan: LayerPlan, paper: LayerPlan) -> dict[str, float]:
    """The relative L2 errors of one context, by name."""
    outputs = {
        "ours": decoded(context, plan),
        "paper": decoded(context, paper),
        "oracle": context.oracle(plan.pages),
        "stream": context.stream(plan.pages),
    }
    return {name: context.error(output) for name, output in outputs.items()}


def decoded(context: Context, plan: LayerPlan) -> torch.Tensor:
    """What our kernels make of the query in a decode step [D], at whatever length."""
    if plan.sparse_decode_from is not None:
        plan = replace(plan, sparse_decode_from=0)
    kv = PagedKV(context.key[:, None], context.value[:, None])
    case = Case.of(kv, len(context.key), 1, 1, plan.means)
    return case.ours(plan)(context.query[None, None])[0, 0]


def synthetic(config: HipConfig, seeds: int, length: int) -> dict[str, dict[str, list[float]]]:
    """Errors by generator and name, one a seed."""
    plan = config.layer_plan(0)
    # the search as published, with as much to keep
    sizes = {key: getattr(config, key) for key in ("sink", "window", "budget")}
    paper = HipConfig.load({"preset": "paper", **sizes}).layer_plan(0)
    found: dict[str, dict[str, list[float]]] = {}
    for name, make in GENERATORS.items():
        samples = [errors(make(seed, length), plan, paper) for seed in range(seeds)]
        found[name] = {who: [sample[who] for sample in samples] for who in samples[0]}
    return found


def others_like(config: HipConfig) -> dict[str, Kept]:
    """A method that is no configuration, with as many tokens, those of the query's page, too."""
    sizes = Sizes(config.sink, config.window + PAGE_SIZE, config.budget)
    return {INFINITE: Kept(METHODS[INFINITE], sizes)}


def label(config: HipConfig) -> str:
    """A short name: the preset and what differs from it."""
    given = given_of(config)
    preset = given.pop("preset", None)
    own = [f"{key}={value}" for key, value in given.items()]
    return ",".join(own if own and preset is None else [config.preset, *own])


def main(argv: list[str]) -> int:
    parser = Parser("fidelity", __doc__)
    parser.add_argument("--seeds", type=int, default=10, help="contexts of each generator; 0: none")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a synthetic context")
    parser.add_argument("--model", action="store_true", help="the built-in model, too")
    parser.add_argument(
        "--context", type=int, nargs="+", default=[32768, 131072], help="tokens, of --model"
    )
    parser.add_argument("--quote-tokens", type=int, nargs="+", default=[32, 16], help="of a quote")
    parser.add_argument("--quotes", type=int, default=50, help="quotes, spread over the document")
    parser.add_argument("--new", type=int, default=16, help="tokens that continue each quote")
    parser.add_argument(
        "--hip-config", action="append",
        help="JSON text or a path; the first is ours in the synthetic contexts, and --model "
        f"compares all that are given (default: {', '.join(filter(None, DEFAULT_CONFIGS))} "
        "beside the default configuration)",
    )  # fmt: skip
    parser.add_output()
    args = parser.parse_args(argv)
    at_least(0, seeds=args.seeds)
    at_least(SHORTEST, length=args.length)
    at_least(1, quotes=args.quotes, new=args.new)
    for tokens in args.quote_tokens:
        at_least(2 * OFFSETS, quote_tokens=tokens)
    if args.length % TOPIC:
        raise ValueError(f"--length {args.length}: give a multiple of {TOPIC}")
    for context in args.context:
        at_least(MIN_CONTEXT, context=context)
        if context > MAX_CONTEXT:
            raise ValueError(
                f"--context {context}: the built-in model has {MAX_CONTEXT:,} positions"
            )
    if not args.seeds and not args.model:
        raise ValueError("--seeds 0 without --model leaves nothing to do")
    configs = [HipConfig.load(source) for source in args.hip_config or DEFAULT_CONFIGS]

    # these tensors are small: more threads only wait for each other on a busy machine
    torch.set_num_threads(1)
    values: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    if args.seeds:
        values = run_synthetic(configs[0], args.seeds, args.length, args.save)
    if args.model:
        values["model"] = {}
        tasks = [
            Task(context, tokens, args.quotes, args.new)
            for context in args.context
            for tokens in args.quote_tokens
        ]
        dense = {KEEP_ALL: HipConfig(preset="dense")}
        configured = {label(config): config for config in configs}
        others = others_like(configs[0])
        named = [*configured, *others]
        for task, right in right_tokens(tasks, {**configured, **dense}, others):
            report_model(task, right, named, args.save)
            values["model"][task.name] = {"steps": task.steps, **right}
            ratios |= {
                f"{task.name}_{name}_share": round(right[name] / max(1, right[KEEP_ALL]), 4)
                for name in named
            }
    if args.json:
        shape = {key: value for key, value in vars(args).items() if key not in ("json", "save")}
        shape["hip_config"] = [label(config) for config in configs]
        print(
            json.dumps({"bench": "fidelity", "config": shape, "ratios": ratios, "values": values})
        )
    return 0


def run_synthetic(
    config: HipConfig, seeds: int, length: int, keep: bool
) -> dict[str, dict[str, float]]:
    """Print and keep the errors; their means over seeds, by generator and name."""
    found = synthetic(config, seeds, length)
    means = {
        name: {who: round(sum(samples) / seeds, 4) for who, samples in of.items()}
        for name, of in found.items()
    }
    names = list(next(iter(means.values())))
    print(f"{'relative L2 error':18s}" + "".join(f"{who:>9s}" for who in names))
    for name, of in means.items():
        print(f"{name:18s}" + "".join(f"{of[who]:9.3f}" for who in names))
    if keep:
        shape = {"part": "synthetic", "seeds": seeds, "length": length, "hip": label(config)}
        rows = {}
        for name, by_who in found.items():
            for who, samples in by_who.items():
                rows[f"{name}.{who}"] = ("relative L2", samples)
                rows[f"{name}.{who}.mean"] = ("relative L2", [sum(samples) / seeds])
                rows[f"{name}.{who}.worst"] = ("relative L2", [max(samples)])
        print(f"saved to {save('fidelity', shape, rows).name}", file=sys.stderr)
    return means


def report_model(task: Task, right: dict[str, int], named: Sequence[str], keep: bool) -> None:
    """Print and keep how many next tokens were right, of one task."""
    said = ", ".join(f"{name} {count}" for name, count in right.items())
    print(f"{task}: right of {task.steps} next tokens: {said}", flush=True)
    if keep:
        for name in named:
            shape = {"part": "model", **task.as_json(), "hip": name}
            rows = {
                "right": ("tokens", [float(right[name])]),
                "right.keep_all": ("tokens", [float(right[KEEP_ALL])]),
            }
            save("fidelity", shape, rows)
