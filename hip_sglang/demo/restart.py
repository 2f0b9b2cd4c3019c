"""``hip-sglang demo --prefix``: twenty questions of one document, and a restart in the middle."""

from __future__ import annotations

import json
import shutil
import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from hip_sglang.demo.corpus import Document, library_text, read_text
from hip_sglang.demo.model import write_model
from hip_sglang.demo.offload import sized_offload, token_bytes_of
from hip_sglang.demo.program import Timed, ask_alone
from hip_sglang.demo.quotes import Quote, pick_quotes, whole_characters
from hip_sglang.demo.run import ROOM, SPARE_TOKENS, TRAINING_CHARACTERS
from hip_sglang.demo.server import serve, unwind_on_signals
from hip_sglang.demo.vocabulary import load_tokenizer
from hip_sglang.kv.memory import GIB

QUESTIONS = 20
REPORT = "demo-prefix.json"


@dataclass(frozen=True)
class Question:
    """A quote, what was answered to it, and whether the answer is the document's."""

    quote: Quote
    answer: Timed

    @property
    def right(self) -> bool:
        return whole_characters(self.answer.text) == self.quote.expected


def run_restart_demo(doc: Path | None, out_dir: Path, context: int = 65536) -> int:
    """Ask half of the questions, end the server, start another on the same disk, ask the rest.

    Writes the report, the model, the disk and the servers' logs to ``out_dir``. A question that is
    answered wrongly is asked again where nothing is known: returns 1 where that answer is another,
    for then a page that came back is not what it was. Raises as ``run_demo`` does.
    """
    console = Console()
    text = read_text(doc) if doc else library_text()
    model, disk = out_dir / "model", out_dir / "disk"
    write_model(model, text=text[:TRAINING_CHARACTERS] if doc else None)
    tokenizer = load_tokenizer(model)
    document = Document.cut(text, tokenizer, context - ROOM)
    quotes = pick_quotes(document, tokenizer, QUESTIONS)
    shutil.rmtree(disk, ignore_errors=True)
    arguments = _arguments(model, disk, context)

    def ask(url: str, quote: Quote, namespace: str | None = None) -> Timed:
        tokens = len(quote.expected_ids)
        return ask_alone(url, document.text + quote.suffix, tokens, namespace)

    sittings: list[list[Question]] = []
    half = QUESTIONS // 2
    with unwind_on_signals(), ExitStack() as stack:
        for number, some in enumerate((quotes[:half], quotes[half:]), 1):
            stack.close()  # the server before
            with console.status(f"server {number}: starting"):
                log = out_dir / f"server-prefix-{number}.log"
                server = stack.enter_context(serve(arguments, log))
            asked = track(some, f"server {number}: {len(document.ids):,} tokens", console=console)
            sittings.append([Question(quote, ask(server.url, quote)) for quote in asked])
        wrong = [one for sitting in sittings for one in sitting if not one.right]
        lost = sum(ask(server.url, one.quote, "cold").text != one.answer.text for one in wrong)
    console.print(_table(sittings))
    restarted, cold = (sitting[0].answer.ttft_s for sitting in reversed(sittings))
    console.print(
        f"{QUESTIONS - len(wrong)} of {QUESTIONS} answers are the document's; after the restart "
        f"the first token came in {restarted / cold:.1%} of the time that it took cold"
    )
    if wrong:
        console.print(
            f"{lost} of the other {len(wrong)} are answered otherwise where nothing is known"
        )
    report = {
        "document_tokens": len(document.ids),
        "questions": QUESTIONS,
        "right": QUESTIONS - len(wrong),
        "lost": lost,
        "ttft_s": [[round(one.answer.ttft_s, 4) for one in sitting] for sitting in sittings],
        "cached_tokens": [[one.answer.cached_tokens for one in sitting] for sitting in sittings],
    }
    (out_dir / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console.print(f"wrote {out_dir / REPORT}", soft_wrap=True)
    return 1 if lost else 0


def _arguments(model: Path, disk: Path, context: int) -> list[str]:
    token_bytes = token_bytes_of(model)
    offload = sized_offload(token_bytes, context, SPARE_TOKENS, share=8)
    # for pages and their summaries, and what wrong answers are asked again
    offload["disk"] = {"path": str(disk.resolve()), "gib": 4 * context * token_bytes / GIB}
    return [
        *("--model-path", str(model)),
        *("--context-length", str(context)),
        *("--attention-backend", "hip_attention"),
        *("--hip-config", json.dumps({"offload": offload})),
    ]


def _table(sittings: list[list[Question]]) -> Table:
    table = Table("questions", "first token", "tokens known", "right")
    for name, sitting in zip(("before the restart", "after it"), sittings, strict=True):
        for which, some in (("first", sitting[:1]), ("others, median", sitting[1:])):
            table.add_row(
                f"{name}, {which}",
                f"{statistics.median(one.answer.ttft_s for one in some):.2f} s",
                f"{statistics.median_low(one.answer.cached_tokens for one in some):,}",
                f"{sum(one.right for one in some)} of {len(some)}",
            )
    return table
