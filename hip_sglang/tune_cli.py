"""``hip-sglang tune``: which settings suit a model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from hip_sglang.cli_errors import CliError, one_line_errors


def tune(
    model: Annotated[
        str, typer.Argument(help="A model's directory; builtin: the one of the demo.")
    ],
    data: Annotated[
        list[Path] | None, typer.Option(help="Text files; none: Python's library.")
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Tokens of a document: in the search, and in the end.")
    ] = "4K,16K",
    steps: Annotated[int, typer.Option(min=1, help="Decode steps of each document.")] = 64,
    trials: Annotated[int, typer.Option(min=1, help="Configurations that are tried.")] = 200,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    hip_config: Annotated[str | None, typer.Option(help="Where to start from.")] = None,
    out: Annotated[Path, typer.Option(help="Folder; a search that is there goes on.")] = Path(
        "tune-out"
    ),
) -> None:
    """Search for settings of each layer with which decode steps read little and stay near dense."""
    if importlib.util.find_spec("optuna") is None:
        raise CliError("optuna is missing; install hip-sglang[tune]")
    with one_line_errors():
        from hip_sglang.tune.start import start

        raise typer.Exit(start(model, data or [], lengths, steps, trials, seed, hip_config, out))
