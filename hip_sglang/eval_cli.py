"""``hip-sglang eval``: what a model finds in long contexts, under each preset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hip_sglang.cli_errors import CliError, one_line_errors

_BUILT_IN = "builtin"


def evaluate(
    model: Annotated[str, typer.Option(help=f"A model's directory, or {_BUILT_IN}.")] = _BUILT_IN,
    tasks: Annotated[
        str | None, typer.Option(help="Which, with commas between them; all if none.")
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens, the answer's included.")] = "4096,16384",
    presets: Annotated[
        str, typer.Option(help="Each has a server; the others are compared to the first.")
    ] = "dense,paper,balanced",
    samples: Annotated[int, typer.Option(min=1, help="Of each task at each length.")] = 10,
    seed: Annotated[int, typer.Option(help="Another one asks other samples.")] = 0,
    doc: Annotated[
        Path | None, typer.Option(help="Document to quote from; Python's library if none.")
    ] = None,
    hip_config: Annotated[
        str | None, typer.Option(help="JSON text or a path, for all presets.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for answers, report and plot; what is there is not asked.")
    ] = Path("eval-out"),
    save: Annotated[bool, typer.Option(help="Append rows to benchmarks/results.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print scores in one last line, too.")
    ] = False,
) -> None:
    """Ask a model tasks of long contexts, under each preset, and compare."""
    from hip_sglang.bench import load_bench

    with one_line_errors():
        evaluation = load_bench("evaluate.run").Evaluation(
            model=None if model == _BUILT_IN else Path(model),
            tasks=tuple(_listed(tasks) if tasks else load_bench("tasks").NAMES),
            lengths=tuple(sorted(map(_tokens, _listed(lengths)))),
            presets=tuple(_listed(presets)),
            samples=samples,
            seed=seed,
            doc=doc,
            hip_config=hip_config,
            out=out,
        )
        raise typer.Exit(
            load_bench("evaluate.run").evaluate(evaluation, keep=save, as_json=as_json)
        )


def _listed(text: str) -> list[str]:
    """Each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _tokens(text: str) -> int:
    if not text.isdecimal():
        raise CliError(f"--lengths {text}: give numbers of tokens, such as 4096,16384")
    return int(text)
