"""Which method is nearest to dense, when all attend exactly to as many tokens?

A model reads documents densely, and is asked their last tokens again, as decode steps, under each
method: how far its next-token distribution is from dense (KL divergence), and how often its first
choice is dense's. Sink, window and budget together are a share of the context, the same for all.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hip_sglang.config import HipConfig
from hip_sglang.demo.corpus import library_text, read_text
from hip_sglang.demo.model import write_model
from hip_sglang.tune.judge import ALWAYS, plans_of
from hip_sglang.tune.run import pieces
from hip_sglang.tune.start import BUILTIN, tokens_of
from hip_sglang.tune.teacher import Attention, Teacher, divergence

from .arguments import Parser, at_least
from .kept import METHODS, Kept, Sizes
from .rows import percentiles, save
from .serve import workspace

PAGE = 64
SPREAD = 20  # characters of Python's library for a token that is used, so that pieces lie apart
OURS: dict[str, dict[str, Any]] = {
    "HiP as published": {"preset": "paper"},
    "ours, pruned dropped": {"remainder": "none"},
    "ours, by means": {"remainder": "mean"},
    "ours": {},
    "ours, top_p 0.95": {"top_p": 0.95},
}


def sizes_of(context: int, share: float) -> Sizes:
    """Sink, window and budget, in whole pages, of at most a share of the context.

    The query's own page is one of them. Raises ValueError where there is no page for each.
    """
    pages = int(context * share) // PAGE
    if pages < 4:
        raise ValueError(
            f"--share {share:g} of --context {context} is less than four pages of {PAGE}; give more"
        )
    window = max(1, pages // 4)
    # beside the sink, and the page that a query stands in
    return Sizes(PAGE, window * PAGE, (pages - window - 2) * PAGE)


def contestants(sizes: Sizes, teacher: Teacher) -> dict[str, Attention]:
    """Theirs have the tokens of our own page in their window."""
    given = {"sink": sizes.sink, "window": sizes.window, "budget": sizes.budget, **ALWAYS}
    found: dict[str, Attention] = {
        name: plans_of(HipConfig.load({**given, **more}), teacher) for name, more in OURS.items()
    }
    theirs = Sizes(sizes.sink, sizes.window + PAGE, sizes.budget)
    return found | {name: Kept(choose, theirs) for name, choose in METHODS.items()}


def run(
    teacher: Teacher, documents: list[list[int]], sizes: Sizes, steps: int
) -> dict[str, dict[str, list[float]]]:
    """Samples by method and metric, one a document."""
    dense = plans_of(HipConfig(preset="dense"), teacher)
    found: dict[str, dict[str, list[float]]] = {}
    for number, ids in enumerate(documents, 1):
        document, tail = teacher.read(ids[:-steps], dense, steps), ids[-steps:]
        said = teacher.ask(document, tail, dense)
        for name, attention in contestants(sizes, teacher).items():
            other = teacher.ask(document, tail, attention)
            metrics = found.setdefault(name, {"kl": [], "same": []})
            metrics["kl"].append(float(divergence(said, other).mean()))
            metrics["same"].append(float((said.argmax(-1) == other.argmax(-1)).float().mean()))
        print(f"document {number} of {len(documents)}", file=sys.stderr, flush=True)
    return found


def main(argv: list[str]) -> int:
    parser = Parser("methods", __doc__)
    parser.add_argument("--model", default=BUILTIN, help="a model's directory, or builtin")
    parser.add_argument("--data", type=Path, nargs="+", help="text files; none: Python's library")
    parser.add_argument("--context", type=int, default=4096, help="tokens of a document")
    parser.add_argument("--share", type=float, default=1 / 8, help="of it that is attended exactly")
    parser.add_argument("--documents", type=int, default=10)
    parser.add_argument("--steps", type=int, default=64, help="tokens of each that are asked again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_output()
    args = parser.parse_args(argv)
    at_least(1, documents=args.documents, steps=args.steps)
    at_least(2 * args.steps, context=args.context)
    sizes = sizes_of(args.context, args.share)
    texts = [read_text(path) for path in args.data or []]
    if not texts:
        texts = [library_text(args.seed)[: SPREAD * args.documents * args.context]]
    with workspace() as folder:
        directory = Path(args.model)
        if args.model == BUILTIN:
            directory = folder / "model"
            write_model(directory)
        ids = tokens_of(directory, texts)
        samples = run(
            Teacher(directory),
            pieces(ids, args.context, args.documents, args.seed),
            sizes,
            args.steps,
        )
    shape = {
        "model": args.model, "context": args.context, "share": args.share, "steps": args.steps,
        "documents": args.documents, "seed": args.seed, "sizes": vars(sizes),
    }  # fmt: skip
    report(shape, samples, as_json=args.json, keep=args.save)
    return 0


def report(
    shape: dict[str, Any],
    samples: dict[str, dict[str, list[float]]],
    *,
    as_json: bool,
    keep: bool,
) -> None:
    """Print means over documents, and keep the rows."""
    print(f"{'':24s}{'KL, nats':>12s}{'p20':>10s}{'p80':>10s}{'same token':>12s}")
    values = {}
    for name, metrics in samples.items():
        mean = {metric: sum(of) / len(of) for metric, of in metrics.items()}
        low, _, high = percentiles(metrics["kl"])
        print(f"{name:24s}{mean['kl']:12.3g}{low:10.2g}{high:10.2g}{mean['same']:12.1%}")
        values[name] = {metric: round(value, 6) for metric, value in mean.items()}
    if keep:
        rows = {
            f"{name}.{metric}": ("nats" if metric == "kl" else "share", of)
            for name, metrics in samples.items()
            for metric, of in metrics.items()
        }
        rows |= {f"{key}.mean": (unit, [sum(of) / len(of)]) for key, (unit, of) in rows.items()}
        print(f"saved to {save('methods', shape, rows).name}", file=sys.stderr)
    if as_json:
        print(json.dumps({"bench": "methods", "config": shape, "values": values}))
