"""``python -m benchmarks.train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .recipe import RECIPES
from .run import train
from .texts import held_out, learned


def main(
    out: Annotated[Path, typer.Option(help="Folder of the model; what is there is replaced.")],
    recipe: Annotated[str, typer.Option(help=", ".join(RECIPES))] = "cpu",
    seed: Annotated[int, typer.Option(help="Another one trains another model.")] = 0,
) -> None:
    """Train a small Llama on lessons in retrieval and Python's library."""
    if recipe not in RECIPES:
        raise typer.BadParameter(f"--recipe {recipe}: choose one of {', '.join(RECIPES)}")
    train(RECIPES[recipe], out, seed, learned(), held_out())


typer.run(main)
