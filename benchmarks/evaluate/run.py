"""An evaluation from its first question to its report."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from hip_kernels.page_size import page_size
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from hip_sglang.config import HipConfig
from hip_sglang.config_text import read
from hip_sglang.demo.corpus import read_text
from hip_sglang.demo.model import write_model
from hip_sglang.demo.server import serve, unwind_on_signals
from hip_sglang.demo.vocabulary import tokenizer_of
from hip_sglang.fingerprint import fingerprint
from hip_sglang.provenance import accelerator, cores, processor, versions

from ..rows import save
from ..tasks import Sample, Task, tasks_of
from ..tasks.sample import BLOCK
from .asking import ask_all
from .picture import draw
from .report import Report, document
from .results import Question, Result, Results

BUILT_IN = "built-in"
REPORT, PICTURE = "report.md", "scores.png"
# what write_model writes last
_WRITTEN = "generation_config.json"


@dataclass(frozen=True)
class Evaluation:
    """What is asked, of which model, and under which presets."""

    model: Path | None  # None: the built-in one, which is written to ``out``
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]  # tokens, the answer's included
    presets: tuple[str, ...]  # the others are compared to the first
    samples: int  # of each task at each length
    seed: int
    doc: Path | None  # quotes are from it; None: Python's library
    hip_config: str | None  # JSON text or a path, for all presets
    out: Path

    def __post_init__(self) -> None:
        """Raises ValueError for what no server needs to be asked about."""
        for name, values in (
            ("tasks", self.tasks), ("lengths", self.lengths), ("presets", self.presets)
        ):  # fmt: skip
            if not values:
                raise ValueError(f"--{name} is empty; give one or more, with commas between them")
        tasks_of(list(self.tasks))
        for preset in self.presets:
            HipConfig.load(self.hip_config, preset)
        if self.model is not None and not (self.model / "config.json").is_file():
            raise ValueError(
                f"--model {self.model}: there is no config.json; give the directory of a model"
            )

    @property
    def directory(self) -> Path:
        return self.model or self.out / "model"

    @cached_property
    def text(self) -> str | None:
        return None if self.doc is None else read_text(self.doc)

    @cached_property
    def by_name(self) -> dict[str, Task]:
        return dict(zip(self.tasks, tasks_of(list(self.tasks), self.text), strict=True))

    def questions(self, preset: str) -> list[Question]:
        """Those of one length and task follow each other, so that they may share a prefix."""
        return [
            Question(preset, task, length, index)
            for length in self.lengths
            for task in self.tasks
            for index in range(self.samples)
        ]

    def settings(self) -> dict[str, Any]:
        """What two answers must have in common to be compared."""
        return {
            "model": BUILT_IN if self.model is None else self.model.resolve().name,
            "fingerprint": fingerprint(self.directory),
            "seed": self.seed,
            "doc": None if self.text is None else _digest(self.text.encode()),
            "hip_config": read(self.hip_config)[0],
            "page": page_size(),
            "version": versions("hip-sglang")["hip-sglang"],
        }

    def arguments(self, preset: str) -> list[str]:
        """The server's."""
        given = read(self.hip_config)[0]
        return [
            *("--model-path", str(self.directory)),
            *("--context-length", str(max(self.lengths))),
            *("--attention-backend", "hip_attention", "--hip-preset", preset),
            *(("--hip-config", json.dumps(given)) if given else ()),
        ]


def evaluate(evaluation: Evaluation, *, keep: bool = False, as_json: bool = False) -> int:
    """Ask what is not answered yet, and write the report; ``keep`` appends rows to ``eval.csv``.

    With ``as_json`` the scores are the last line that is printed. Raises ValueError where something
    cannot be used, and ChildProcessError or ConnectionError where a server ends by itself; what was
    answered by then is kept.
    """
    console = Console()
    results = Results(evaluation.out)
    try:
        if evaluation.model is None and not (evaluation.directory / _WRITTEN).is_file():
            write_model(evaluation.directory)
        settings = evaluation.settings()
        results.settle(settings)
        with unwind_on_signals():
            ask_missing(evaluation, results, console)
    finally:
        results.close()

    report = Report(
        evaluation.tasks,
        evaluation.lengths,
        evaluation.presets,
        evaluation.samples,
        results.found,
    )
    draw(evaluation.out / PICTURE, report)
    notes = unpruned(evaluation)
    told = {name: value for name, value in settings.items() if value not in (None, {})}
    about = {**told, "samples": evaluation.samples, **_where()}
    text = document(report, about, notes, PICTURE)
    (evaluation.out / REPORT).write_text(text, encoding="utf-8")
    for shown in (*report.tables(), *notes):
        console.print(shown)
    for file in (REPORT, PICTURE):
        console.print(f"wrote {evaluation.out / file}", soft_wrap=True)
    if keep:
        for length in evaluation.lengths:
            shape = {
                "model": settings["model"], "length": length, "samples": evaluation.samples,
                "seed": evaluation.seed, "hip": settings["hip_config"],
                **({"doc": settings["doc"]} if evaluation.doc else {}),
            }  # fmt: skip
            path = save("eval", shape, report.metrics(length))
        console.print(f"saved to {path.name}")
    if as_json:
        values = {
            f"{length}.{name}": metric[1][0]
            for length in evaluation.lengths
            for name, metric in report.metrics(length).items()
        }
        print(json.dumps({"bench": "eval", "values": values}))
    return 0


def ask_missing(evaluation: Evaluation, results: Results, console: Console) -> None:
    """Boot a server for each preset that has not answered everything, and ask it the rest."""
    missing = {
        preset: [one for one in evaluation.questions(preset) if one not in results.found]
        for preset in evaluation.presets
    }
    if not any(missing.values()):
        return
    tokenizer = tokenizer_of(evaluation.directory)

    def sample_of(question: Question) -> Sample:
        task = evaluation.by_name[question.task]
        return task.sample(tokenizer, question.length, evaluation.seed, question.index)

    # a text may be too long for a document, or too short for a task: said before a server starts
    for length in {min(evaluation.lengths), max(evaluation.lengths)}:
        for task in evaluation.tasks:
            # each block of samples begins elsewhere in a document of the user's
            for index in range(0, evaluation.samples if evaluation.doc else 1, BLOCK):
                sample_of(Question(evaluation.presets[0], task, length, index))

    columns = (
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for preset, questions in missing.items():
            total = len(evaluation.questions(preset))
            known = total - len(questions)
            bar = progress.add_task(preset, total=total, completed=known)
            if not console.is_terminal:
                # a log shows the bars only when all is over
                console.print(f"{datetime.now():%H:%M:%S} {preset}: {known} of {total} answered")
            if questions:
                progress.update(bar, description=f"{preset}: starting the server")
                keep = _keeper(evaluation, results, partial(progress.advance, bar))
                log = evaluation.out / f"server-{preset}.log"
                with serve(evaluation.arguments(preset), log) as server:
                    progress.update(bar, description=preset)
                    try:
                        asyncio.run(ask_all(server.url, questions, sample_of, keep))
                    except ConnectionError as error:
                        raise ConnectionError(
                            f"{error}; see {log}. What was answered is kept: the same command "
                            "asks the rest"
                        ) from None


def _keeper(
    evaluation: Evaluation, results: Results, advance: Callable[[], None]
) -> Callable[[Question, Sample, str], None]:
    """What is done with an answer."""

    def keep(question: Question, sample: Sample, said: str) -> None:
        score = evaluation.by_name[question.task].score(sample, said)
        results.add(Result(question, score, said, sample.answers, sample.depths, len(sample.ids)))
        advance()

    return keep


def unpruned(evaluation: Evaluation) -> list[str]:
    """A line where some length is too short for a preset to do anything else than dense."""
    start = HipConfig.load(evaluation.hip_config, evaluation.presets[0]).start
    lengths = [f"{length:,}" for length in evaluation.lengths if length <= start]
    if not lengths:
        return []
    return [
        f"At {' and '.join(lengths)} tokens nothing is pruned under any preset: queries at "
        f"positions below {start:,} attend to everything (dense_threshold)."
    ]


def _where() -> dict[str, Any]:
    machine = accelerator() or processor()
    return {"machine": f"{machine}, {cores()} cores", **versions("sglang", "torch")}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
