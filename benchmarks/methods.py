"""Which method is nearest to dense, when all attend exactly to as many tokens?

A model reads documents densely, and is asked their last tokens again, as decode steps, under each
method; with --own-prefill it reads them under each configuration of ours, and is asked densely, or,
with --whole, under the same. How
far is its next-token distribution from dense (KL divergence), how often is its first choice
dense's, how often does it give the answer where there is one, and what share of the KV does a step
read? Sink, window and budget together are a share of the context, the same for all.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hip_sglang.config import HipConfig
from hip_sglang.demo.corpus import library_text, read_text
from hip_sglang.demo.vocabulary import Tokenizer, tokenizer_of
from hip_sglang.tune.judge import plans_of
from hip_sglang.tune.run import pieces
from hip_sglang.tune.start import tokens_of
from hip_sglang.tune.teacher import Teacher, divergence

from .arguments import TRAINED, Parser, at_least, model_of, name_of, settle_pages
from .contest import CONTESTS, Asked, Contestant, contestants, sizes_of
from .evaluate.intervals import of_difference
from .rows import percentiles, save
from .serve import workspace
from .tasks import NAMES, tasks_of
from .train.texts import held_out

SPREAD = 20  # characters of Python's library for a token that is used, so that pieces lie apart
DENSE = "dense"
UNITS = {"kl": "nats"}  # all others are shares

Samples = dict[str, dict[str, list[float]]]


def run(
    teacher: Teacher,
    asked: list[Asked],
    contest: Mapping[str, Contestant],
    *,
    reads: bool,
    steps: bool,
) -> Samples:
    """Samples by method and metric, one a document.

    What each method does itself: whether it reads documents, and whether it is asked; elsewise that
    is dense. Dense itself is the first method.
    """
    dense = plans_of(HipConfig(preset="dense"), teacher)
    found: Samples = {}
    longest = max(len(one.ids) + len(one.tail) for one in asked)
    shared, before = teacher.read([], dense, longest), list[int]()
    for number, one in enumerate(asked, 1):
        # questions of one text follow each other
        differ = (at for at, (a, b) in enumerate(zip(before, one.ids, strict=False)) if a != b)
        kept = next(differ, min(len(before), len(one.ids)))
        teacher.read_on(shared, kept, one.ids[kept:], dense)
        before = one.ids
        said = teacher.ask(shared, one.tail, dense)
        for name, attention in {DENSE: dense, **contest}.items():
            document = teacher.read(one.ids, attention, len(one.tail)) if reads else shared
            other = teacher.ask(document, one.tail, attention if steps else dense)
            choices = other.argmax(-1)
            metrics = {
                "kl": float(divergence(said, other).mean()),
                "same": float((said.argmax(-1) == choices).float().mean()),
            }
            if one.answer is not None:
                metrics["right"] = float(choices.tolist() == one.answer)
            for metric, value in metrics.items():
                found.setdefault(name, {}).setdefault(metric, []).append(value)
        print(f"document {number} of {len(asked)}", file=sys.stderr, flush=True)
    for name in found:
        stepped = contest[name] if steps and name != DENSE else dense
        found[name]["read"] = [stepped.share_read]
    return found


def main(argv: list[str]) -> int:
    parser = Parser("methods", __doc__)
    parser.add_model()
    parser.add_argument("--contest", choices=CONTESTS, default="methods")
    parser.add_argument("--data", type=Path, nargs="+", help="text files; none: Python's library")
    parser.add_argument("--task", choices=NAMES, help="answers of a task in place of texts' ends")
    parser.add_argument("--context", type=int, default=4096, help="tokens of a document")
    parser.add_argument("--share", type=float, default=1 / 8, help="of it that is attended exactly")
    parser.add_argument("--documents", type=int, default=10)
    parser.add_argument("--steps", type=int, default=64, help="tokens of a text that are asked")
    itself = parser.add_mutually_exclusive_group()
    itself.add_argument(
        "--own-prefill",
        action="store_true",
        help="each reads documents itself, and all are asked densely",
    )
    itself.add_argument("--whole", action="store_true", help="each reads, and is asked, itself")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_output()
    args = parser.parse_args(argv)
    at_least(1, documents=args.documents, steps=args.steps)
    at_least(2 * args.steps, context=args.context)
    settle_pages(args.page_size)
    sizes = sizes_of(args.context, args.share)
    texts = [read_text(path) for path in args.data or []]
    with workspace() as folder:
        directory = model_of(args.model, folder)
        if args.model == TRAINED:
            texts = texts or held_out()
        tokenizer = tokenizer_of(directory)
        asked = questions(args, tokenizer, texts)
        teacher = Teacher(directory)
        reads = args.own_prefill or args.whole
        contest = contestants(args.contest, sizes, teacher, own_prefill=reads)
        samples = run(teacher, asked, contest, reads=reads, steps=not args.own_prefill)
    shape = {
        "model": name_of(args.model),
        "contest": args.contest, "task": args.task, "context": args.context, "share": args.share,
        "steps": None if args.task else args.steps, "documents": args.documents,
        "own_prefill": reads, "seed": args.seed, "sizes": vars(sizes),
        **({"whole": True} if args.whole else {}),
    }  # fmt: skip
    report(shape, samples, as_json=args.json, keep=args.save)
    return 0


def questions(args: Namespace, tokenizer: Tokenizer, texts: list[str]) -> list[Asked]:
    """Samples of a task, or pieces of texts; without texts, of Python's library."""
    if args.task is not None:
        (task,) = tasks_of([args.task], "\n".join(texts) or None)
        samples = (
            task.sample(tokenizer, args.context, args.seed, n) for n in range(args.documents)
        )
        return [Asked.of_sample(sample, tokenizer) for sample in samples]
    texts = texts or [library_text(args.seed)[: SPREAD * args.documents * args.context]]
    chosen = pieces(tokens_of(tokenizer, texts), args.context, args.documents, args.seed)
    return [Asked.of_text(ids, args.steps) for ids in chosen]


def report(shape: dict[str, Any], samples: Samples, *, as_json: bool, keep: bool) -> None:
    """Print means over documents, and keep the rows."""
    means = {name: summary(metrics, samples[DENSE]) for name, metrics in samples.items()}
    print(
        f"{'':24s}{'KL, nats':>12s}{'p20':>10s}{'p80':>10s}{'same':>8s}{'KV read':>9s}{'right':>8s}"
    )
    for name, mean in means.items():
        low, _, high = percentiles(samples[name]["kl"])
        right = f"{mean['right']:8.1%}" if "right" in mean else f"{'-':>8s}"
        print(
            f"{name:24s}{mean['kl']:12.3g}{low:10.2g}{high:10.2g}{mean['same']:8.1%}"
            f"{mean['read']:9.1%}{right}"
        )
    if keep:
        rows = {f"{name}.kl": ("nats", metrics["kl"]) for name, metrics in samples.items()}
        rows |= {
            f"{name}.{metric}.mean": (UNITS.get(metric, "share"), [value])
            for name, mean in means.items()
            for metric, value in mean.items()
        }
        print(f"saved to {save('methods', shape, rows).name}", file=sys.stderr)
    if as_json:
        values = {
            name: {metric: round(value, 6) for metric, value in mean.items()}
            for name, mean in means.items()
        }
        print(json.dumps({"bench": "methods", "config": shape, "values": values}))


def summary(metrics: dict[str, list[float]], dense: dict[str, list[float]]) -> dict[str, float]:
    """Means; of answers also how many more are right than of dense, with its 95% interval."""
    found = {metric: sum(of) / len(of) for metric, of in metrics.items()}
    if "right" in metrics:
        gain = of_difference(dense["right"], metrics["right"])
        found |= {"gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high}
    return found
