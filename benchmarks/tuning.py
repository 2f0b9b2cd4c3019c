"""Does a search find more than chance does, and more than the presets are?

From the presets' settings, with sink, window and budget a share of the context, `hip-sglang tune`'s
search and random draws try as many configurations. Random draws, too, begin with what is the same
for all layers and one would try by hand. Their fronts are
judged again on documents that neither has seen: the hypervolume of each, in decades of KL
divergence below that of the published search times the share of the KV that need not be read; and
whether what was better than a preset in both is so there, too.
"""

from __future__ import annotations

import json
import math
import random
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from hip_sglang.config import HipConfig
from hip_sglang.demo.vocabulary import tokenizer_of
from hip_sglang.tune.judge import Judge
from hip_sglang.tune.run import PIECES, SPARSE_PRESETS, config_of, pieces
from hip_sglang.tune.search import Trial, Trials, Values, dominates, front, search
from hip_sglang.tune.space import Genes, Space
from hip_sglang.tune.start import tokens_of
from hip_sglang.tune.teacher import Teacher

from .arguments import Parser, at_least, model_of, name_of, settle_pages
from .contest import sizes_of
from .rows import percentiles, save
from .serve import workspace
from .train.texts import held_out

# what is nearer to dense is as near as that
LEAST = 1e-6


def drawn(space: Space, count: int, seed: int) -> list[Genes]:
    """So many configurations: what one would try by hand, and then any."""
    chance, options, start = random.Random(seed), space.options(), space.uniform()[:count]
    more = range(count - len(start))
    return [*start, *({name: chance.choice(of) for name, of in options.items()} for _ in more)]


def hypervolume(values: Sequence[Values], worst: Values) -> float:
    """The area of (KL, share) that these dominate, up to the worst; KL in decades."""
    area, least = 0.0, worst[0]
    for divergence, share in sorted(values, key=lambda one: one[1]):
        if divergence < least and share < worst[1]:
            area += math.log10(least / max(LEAST, divergence)) * (worst[1] - share)
            least = max(LEAST, divergence)
    return area


def fronts(space: Space, judge: Judge, trials: int, seed: int) -> dict[str, list[Trial]]:
    """By who found them."""
    with tempfile.TemporaryDirectory() as folder, closing(Trials(Path(folder) / "t")) as known:
        searched = search(
            space, lambda genes: judge(config_of(space, genes)), trials, known, seed=seed
        )
    by_chance = [
        Trial(genes, judge(config_of(space, genes))) for genes in drawn(space, trials, seed)
    ]
    return {"search": front(searched), "chance": front(by_chance)}


def main(argv: list[str]) -> int:
    parser = Parser("tuning", __doc__)
    parser.add_model()
    parser.add_argument("--context", type=int, default=4096, help="tokens of a document")
    parser.add_argument("--share", type=float, default=1 / 8, help="of it that presets attend to")
    parser.add_argument("--steps", type=int, default=64, help="tokens of a document that are asked")
    parser.add_argument("--trials", type=int, default=200, help="of the search, and of chance")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_output()
    args = parser.parse_args(argv)
    at_least(1, steps=args.steps, trials=args.trials, seeds=args.seeds)
    at_least(2 * args.steps, context=args.context)
    settle_pages(args.page_size)
    sizes = sizes_of(args.context, args.share)
    rows: dict[str, tuple[str, list[float]]] = {}
    with workspace() as folder:
        directory = model_of(args.model, folder)
        teacher = Teacher(directory)
        prompt = args.context - args.steps
        space = Space.of(HipConfig.load(vars(sizes)), teacher.layers, prompt)
        ids = tokens_of(tokenizer_of(directory), held_out())
        middle = len(ids) // 2
        for seed in range(args.seeds):
            seen, unseen = (
                Judge(teacher, pieces(part, args.context, PIECES, seed), args.steps)
                for part in (ids[:middle], ids[middle:])
            )
            found = fronts(space, seen, args.trials, seed)
            for metric, unit, value in told(space, found, seen, unseen):
                rows.setdefault(metric, (unit, []))[1].append(value)
            print(f"seed {seed + 1} of {args.seeds}", file=sys.stderr, flush=True)
    shape = {
        "model": name_of(args.model),
        "context": args.context, "share": args.share, "steps": args.steps, "trials": args.trials,
        "seeds": args.seeds,
    }  # fmt: skip
    report(shape, rows, as_json=args.json, keep=args.save)
    return 0


def told(
    space: Space, found: dict[str, list[Trial]], seen: Judge, unseen: Judge
) -> list[tuple[str, str, float]]:
    """Metric, unit and value of one seed."""
    genes: dict[str, Genes] = {name: {"preset": name} for name in SPARSE_PRESETS}
    known, there = (
        {name: judge(config_of(space, preset)) for name, preset in genes.items()}
        for judge in (seen, unseen)
    )
    worst = there["paper"][0], 1.0
    areas = {
        who: hypervolume([unseen(config_of(space, trial.genes)) for trial in trials], worst)
        for who, trials in found.items()
    }
    rows = [(f"hypervolume.{who}", "decades", area) for who, area in areas.items()]
    rows.append(("hypervolume.ratio", "ratio", areas["search"] / max(LEAST, areas["chance"])))
    for name in SPARSE_PRESETS:
        rows += [(f"{name}.kl", "nats", there[name][0]), (f"{name}.read", "share", there[name][1])]
        chosen = nearest(found["search"], known[name])
        now = there[name] if chosen is None else unseen(config_of(space, chosen.genes))
        rows += [(f"{name}.tuned.kl", "nats", now[0]), (f"{name}.tuned.read", "share", now[1])]
        rows.append((f"{name}.dominated", "share", float(dominates(now, there[name]))))
    return rows


def nearest(found: list[Trial], preset: Values) -> Trial | None:
    """The nearest to dense of those that are better than a preset in both, and read less by 2%.

    With ``top_p`` some documents make a configuration read more than others do.
    """
    divergence, share = preset
    better = [trial for trial in found if dominates(trial.values, (divergence, 0.98 * share))]
    return min(better, key=lambda trial: trial.values[0], default=None)


def report(
    shape: dict[str, Any],
    rows: dict[str, tuple[str, list[float]]],
    *,
    as_json: bool,
    keep: bool,
) -> None:
    """Print each metric of each seed, and keep the rows."""
    for metric, (unit, values) in rows.items():
        print(f"{metric:28s}{unit:>16s}" + "".join(f"{value:12.4g}" for value in values))
    if keep:
        print(f"saved to {save('tuning', shape, rows).name}", file=sys.stderr)
    if as_json:
        values = {metric: percentiles(of)[1] for metric, (_, of) in rows.items()}
        print(json.dumps({"bench": "tuning", "config": shape, "values": values}))
