"""``hip-sglang demo``: serve a long document three ways, and see who still finds the quotes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from hip_sglang.demo.corpus import Document, library_text, read_text
from hip_sglang.demo.model import write_model
from hip_sglang.demo.offload import sized_offload, token_bytes_of
from hip_sglang.demo.picture import draw_selections
from hip_sglang.demo.program import Answer, ask, measure_speed
from hip_sglang.demo.quotes import Quote, pick_quotes
from hip_sglang.demo.report import DemoReport, Residency, RunResult
from hip_sglang.demo.selections import mean_share_read, read_trace, share_held
from hip_sglang.demo.server import Server, serve, unwind_on_signals
from hip_sglang.demo.vocabulary import load_tokenizer

QUOTES = 10
REPORT = "demo-report.json"
PICTURE = "selections.png"
# tokens after the document: a quote and its continuation
ROOM = 128
# tokens of KV beside the longest context: some pages for each branch
SPARE_TOKENS = 8192
_MINIMUM_CONTEXT = 2048
TRAINING_CHARACTERS = 8_000_000


@dataclass(frozen=True)
class Way:
    """One way to serve, and how many tokens it serves."""

    name: str
    arguments: tuple[str, ...]
    context: int
    device_tokens: int | None = None  # where KV is offloaded


def run_demo(
    doc: Path | None, out_dir: Path, context: int = 65536, *, offload: bool = False
) -> int:
    """Serve ``doc`` (default: Python's library) and ask for quotes from it.

    HiP reads ``context`` tokens, our keep-all half of that, SGLang's ``torch_native`` an eighth.
    With ``offload`` HiP has its KV in host memory, and a device that holds an eighth of it.
    Where HiP answers wrongly, keep-all is asked the same at HiP's length. Writes the report, the
    picture, the model and the servers' logs to ``out_dir``. Returns 1 where keep-all is right and
    HiP wrong, else 0. Raises ValueError where the document cannot be used, ChildProcessError or
    ConnectionError where a server ends by itself.
    """
    console = Console()
    columns = (
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
    )
    with unwind_on_signals(), Progress(*columns, console=console) as progress:
        demo = _Demo(doc, out_dir, progress, offload)
        report = demo.run(context)
    for table in report.tables():
        console.print(table)
    if (shown := report.runs[0]).residency is not None:
        console.print(shown.residency.sentence(shown.document_tokens))
    for file in (PICTURE, REPORT):
        console.print(f"wrote {out_dir / file}", soft_wrap=True)
    return 1 if report.lost else 0


def scaled_ways(
    tokens: int, context: int, trace: Path, token_bytes: int | None = None
) -> tuple[Way, Way, Way]:
    """HiP, keep-all and torch_native, for a document of ``tokens`` tokens and a wanted context.

    With ``token_bytes``, what the KV of a token takes, the first has its KV in host memory.
    """
    # whole pages
    context = min(context, -(-(tokens + ROOM) // 64) * 64)
    half, eighth = (min(context, max(_MINIMUM_CONTEXT, context // part)) for part in (2, 8))
    hip = ("--attention-backend", "hip_attention", "--hip-preset")
    config: dict[str, Any] = {"trace": str(trace.resolve())}
    name, device_tokens = "HiP (balanced)", None
    if token_bytes is not None:
        config["offload"] = sized_offload(token_bytes, context, SPARE_TOKENS, share=8)
        device_tokens = config["offload"]["device_tokens"]
        name = "HiP (offloaded)"
    arguments = *hip, "balanced", "--hip-config", json.dumps(config)
    return (
        Way(name, arguments, context, device_tokens),
        Way("HiP keep-all", (*hip, "dense"), half),
        Way("SGLang torch_native", ("--attention-backend", "torch_native"), eighth),
    )


class _Demo:
    """The state that the three ways share: the text, the model and the folder."""

    def __init__(self, doc: Path | None, out_dir: Path, progress: Progress, offload: bool) -> None:
        self._source = str(doc) if doc else "the Python standard library's source"
        self._text = read_text(doc) if doc else library_text()
        self._out = out_dir
        self._progress = progress
        self._model = out_dir / "model"
        with self._stage("writing the model"):
            # a user's document may be in any script: its own words make the better tokens
            write_model(self._model, text=self._text[:TRAINING_CHARACTERS] if doc else None)
        self._tokenizer = load_tokenizer(self._model)
        self._token_bytes = token_bytes_of(self._model) if offload else None

    def run(self, context: int) -> DemoReport:
        trace_file = self._out / "trace.jsonl"
        trace_file.unlink(missing_ok=True)
        document, quotes = self._read(context)
        hip, keep_all, native = scaled_ways(
            len(document.ids), context, trace_file, self._token_bytes
        )
        # all that can be refused is refused before the first server starts
        halves, eighths = self._read(keep_all.context), self._read(native.context)
        if hip.context < context:
            self._progress.console.print(
                f"the document has {len(document.ids):,} tokens: serving "
                f"{hip.context:,}, {keep_all.context:,} and {native.context:,} of them"
            )

        with self._serving(hip, hip.context) as server:
            shown = self._measure(hip, server, document, quotes)
        trace = read_trace(trace_file)
        steps = [step for answer in shown.answers for step in trace.get(answer.request_id, [])]
        residency = None
        if hip.device_tokens is not None:
            residency = Residency(hip.device_tokens, share_held(steps))
        shown = replace(shown, kv_read_share=mean_share_read(steps), residency=residency)
        draw_selections(self._out / PICTURE, shown, trace)

        wrong = [answer.quote for answer in shown.answers if not answer.correct]
        with self._serving(keep_all, hip.context if wrong else keep_all.context) as server:
            beside = self._measure(keep_all, server, *halves)
            opinions = self._ask(server, document, wrong) if wrong else []
        with self._serving(native, native.context) as server:
            reference = self._measure(native, server, *eighths)

        report = DemoReport(self._source, (shown, beside, reference), tuple(opinions))
        text = json.dumps(report.as_json(), indent=2, ensure_ascii=False)
        (self._out / REPORT).write_text(text + "\n", encoding="utf-8")
        return report

    def _read(self, context: int) -> tuple[Document, list[Quote]]:
        document = Document.cut(self._text, self._tokenizer, context - ROOM)
        return document, pick_quotes(document, self._tokenizer, QUOTES)

    @contextmanager
    def _serving(self, way: Way, context: int) -> Iterator[Server]:
        log = self._out / f"server-{way.name.split()[-1].strip('()')}.log"
        arguments = [
            *("--model-path", str(self._model)),
            *("--context-length", str(context)),
            *("--max-total-tokens", str(context + SPARE_TOKENS)),
            *way.arguments,
        ]
        with ExitStack() as stack:
            with self._stage(f"{way.name}: starting the server"):
                server = stack.enter_context(serve(arguments, log))
            yield server

    def _measure(
        self, way: Way, server: Server, document: Document, quotes: Sequence[Quote]
    ) -> RunResult:
        with self._stage(f"{way.name}: reading {len(document.ids):,} tokens, decoding alone"):
            speed = measure_speed(server.url, document.text, document.text + quotes[0].suffix)
        answers = self._ask(server, document, quotes)
        return RunResult(
            name=way.name,
            context=way.context,
            document_tokens=len(document.ids),
            boot_s=server.boot_s,
            speed=speed,
            answers=tuple(answers),
        )

    def _ask(self, server: Server, document: Document, quotes: Sequence[Quote]) -> list[Answer]:
        stage = self._add_stage(f"continuing {len(quotes)} quotes", len(quotes))
        return ask(server.url, document.text, quotes, lambda: self._progress.advance(stage))

    @contextmanager
    def _stage(self, description: str) -> Iterator[None]:
        stage = self._add_stage(description, None)
        yield
        self._progress.update(stage, total=1, completed=1)

    def _add_stage(self, description: str, steps: int | None) -> TaskID:
        if not self._progress.console.is_terminal:
            # a log shows the bars only when all is over
            self._progress.console.print(f"{datetime.now():%H:%M:%S} {description}")
        return self._progress.add_task(description, total=steps)
