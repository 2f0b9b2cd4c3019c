"""``hip-sglang tune``: from a model and some documents to the Pareto set of configurations."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from hip_sglang.config import HipConfig
from hip_sglang.tune.judge import Judge
from hip_sglang.tune.picture import draw
from hip_sglang.tune.search import Trial, Trials, dominates, front, search
from hip_sglang.tune.space import ALWAYS, Genes, Space
from hip_sglang.tune.teacher import Teacher

# documents of each length, for the search and for the end
PIECES = 6
# of the text, for the end
HELD_OUT = 0.3
# what the search at the short length hands on to the long one
MOST_PROMISING = 16
SPARSE_PRESETS = ("balanced", "quality", "paper")
SETTINGS, TRIALS, LONG, HELD, REPORT, PICTURE = (
    "tune.json",
    "trials.jsonl",
    "long.jsonl",
    "held-out.jsonl",
    "pareto.json",
    "pareto.png",
)


OURS = re.compile(r"config-\d+\.json")


@dataclass(frozen=True)
class Settings:
    """What a search is; one that goes on has the same."""

    model: str
    fingerprint: str  # of it
    version: str  # of what judges it
    data: list[str]  # digests of texts
    short: int  # tokens of a document in the search
    long: int  # and of those that decide
    steps: int  # decode steps of each
    seed: int
    page: int  # tokens of one
    hip: dict[str, Any]  # the configuration to start from


def run_tune(
    teacher: Teacher, ids: list[int], settings: Settings, trials: int, out: Path, known: Trials
) -> int:
    """Search, judge the best at the long length, and then on text that no search has seen.

    Writes ``pareto.json``, ``pareto.png``, and each configuration as a file for ``--hip-config``.
    ``known`` is what was tried there before. Returns 0. Raises ValueError where the text is too
    short.
    """
    console = Console()
    prompt = settings.short - settings.steps
    space = Space.of(HipConfig.load(settings.hip), teacher.layers, prompt)
    cut = int(len(ids) * (1 - HELD_OUT))
    seen, unseen = ids[:cut], ids[cut:]
    # too little text is said now, and not when a search is over
    for text, length in ((seen, settings.short), (seen, settings.long), (unseen, settings.long)):
        pieces(text, length, PIECES, settings.seed)
    with Progress(console=console) as progress:

        def judged(
            text: list[int], length: int, file: str, some: Sequence[Genes], what: str
        ) -> list[Trial]:
            """Each at a length, but those that were before."""
            bar = progress.add_task(what, total=len(some))
            judge = None
            with closing(Trials(out / file)) as judged_before:
                found = {_name(trial.genes): trial for trial in judged_before.known}
                for genes in some:
                    if _name(genes) not in found:
                        judge = judge or _judge(teacher, text, length, settings)
                        found[_name(genes)] = Trial(genes, judge(config_of(space, genes)))
                        judged_before.add(found[_name(genes)])
                    progress.advance(bar)
            return [found[_name(genes)] for genes in some]

        bar = progress.add_task(f"searching at {settings.short:,} tokens", total=trials)
        judge = _judge(teacher, seen, settings.short, settings)
        tried = search(
            space,
            lambda genes: judge(config_of(space, genes)),
            trials,
            known,
            seed=settings.seed,
            on_trial=lambda: progress.advance(bar),
        )
        best = _spread([trial.genes for trial in front(tried)], MOST_PROMISING)
        long = judged(seen, settings.long, LONG, best, f"the best at {settings.long:,}")
        pareto = [trial.genes for trial in front(long)]
        asked = [*pareto, *({"preset": name} for name in SPARSE_PRESETS)]
        held = judged(unseen, settings.long, HELD, asked, "on text that it has not seen")
    tuned, presets = held[: len(pareto)], held[len(pareto) :]
    _write(space, tuned, presets, out)
    draw(out / PICTURE, tried, long, tuned, presets)
    console.print(_table(tuned, presets))
    for preset in presets:
        found = (n for n, trial in enumerate(tuned, 1) if dominates(trial.values, preset.values))
        better = next(found, None)
        name = "no configuration" if better is None else f"config-{better}.json"
        console.print(f"than {preset.genes['preset']}, {name} is better in both")
    console.print(f"wrote {out / REPORT} and {out / PICTURE}", soft_wrap=True)
    return 0


def _judge(teacher: Teacher, text: list[int], length: int, settings: Settings) -> Judge:
    return Judge(teacher, pieces(text, length, PIECES, settings.seed), settings.steps)


def pieces(ids: list[int], length: int, count: int, seed: int) -> list[list[int]]:
    """So many parts of a text, which do not overlap. Raises ValueError where it is too short."""
    places = len(ids) // length
    if places < count:
        raise ValueError(
            f"a part of the text has {len(ids):,} tokens, too few for {count} documents of "
            f"{length:,}; give more text, or shorter documents"
        )
    chosen = sorted(random.Random(seed).sample(range(places), count))
    return [ids[place * length : (place + 1) * length] for place in chosen]


def config_of(space: Space, genes: Genes) -> HipConfig:
    """Of genes, or of a preset with the same sizes."""
    if "preset" in genes:
        sizes = {name: getattr(space.base, name) for name in ("sink", "window", "budget")}
        return HipConfig.load({**genes, **sizes, **ALWAYS})
    return space.config(genes, **ALWAYS)


def _name(genes: Genes) -> str:
    return json.dumps(genes, sort_keys=True)


def _spread(some: list[Genes], most: int) -> list[Genes]:
    """At most so many, the first and the last among them."""
    if len(some) <= most:
        return some
    return [some[round(at * (len(some) - 1) / (most - 1))] for at in range(most)]


def _write(space: Space, tuned: list[Trial], presets: list[Trial], out: Path) -> None:
    for old in out.iterdir():
        if OURS.fullmatch(old.name):
            old.unlink()
    report: dict[str, Any] = {"configurations": [], "presets": []}
    for number, trial in enumerate(tuned, 1):
        file = f"config-{number}.json"
        config = space.config(trial.genes).model_dump(mode="json", exclude_unset=True)
        (out / file).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        report["configurations"].append(
            {"file": file, "kl": trial.values[0], "share_read": trial.values[1]}
        )
    report["presets"] = [
        {**trial.genes, "kl": trial.values[0], "share_read": trial.values[1]} for trial in presets
    ]
    (out / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _table(tuned: list[Trial], presets: list[Trial]) -> Table:
    table = Table("configuration", "KV read a step", "KL from dense, nats")
    rows = [(f"config-{number}.json", trial) for number, trial in enumerate(tuned, 1)]
    for name, trial in [*rows, *((trial.genes["preset"], trial) for trial in presets)]:
        table.add_row(name, f"{trial.values[1]:.1%}", f"{trial.values[0]:.2e}")
    return table
