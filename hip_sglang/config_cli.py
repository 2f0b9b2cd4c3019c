"""``hip-sglang config``: what the configuration is, may be, and will do."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from hip_kernels.page_size import page_size

from hip_sglang.cli_errors import one_line_errors

if TYPE_CHECKING:
    from rich.table import Table

    from hip_sglang.config import LayerPlan

# torch comes with the configuration, so it is imported inside the commands

config_app = typer.Typer(help="The configuration of HiP attention.")

HipConfigOption = Annotated[str | None, typer.Option(help="JSON text or a path, as SGLang takes.")]
HipPresetOption = Annotated[str | None, typer.Option(help="A preset, such as balanced.")]
LayersOption = Annotated[int, typer.Option(min=1, max=10_000, help="The model's layers.")]


@config_app.command("show")
def config_show(
    hip_config: HipConfigOption = None,
    hip_preset: HipPresetOption = None,
    layers: LayersOption = 32,
) -> None:
    """Print the resolved configuration as JSON, and what it means for each layer."""
    with one_line_errors():
        from hip_sglang.config import HipConfig
        from hip_sglang.explain import plans_of

        config = HipConfig.load(hip_config, hip_preset)
        plans = plans_of(config, layers)
    print(config.model_dump_json(indent=2), flush=True)
    # for people: stdout stays one JSON document
    _print(_plans_table(plans), to_stderr=True)


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of the configuration."""
    from hip_sglang.config import HipConfig

    schema = HipConfig.model_json_schema()
    draft = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    print(json.dumps(draft | schema, indent=2))


@config_app.command("explain")
def config_explain(
    hip_config: HipConfigOption = None,
    hip_preset: HipPresetOption = None,
    layers: LayersOption = 32,
    lengths: Annotated[
        str, typer.Option(help="Tokens of context, with K and M for 1024 and 1024 x 1024.")
    ] = "4K,8K,32K,128K,1M",
) -> None:
    """Say what each layer will do at some lengths of context."""
    with one_line_errors():
        from hip_sglang.config import HipConfig
        from hip_sglang.explain import grouped, parse_lengths, plans_of, sentences

        config = HipConfig.load(hip_config, hip_preset)
        wanted = parse_lengths(lengths)
        groups = grouped(plans_of(config, layers))
    print(f"preset {config.preset}; a page is {page_size()} tokens, and positions count from 0")
    for name, plan in groups:
        print(f"\n{name}")
        for sentence in sentences(plan):
            print(f"  {sentence}")
        _print(_lengths_table(plan, wanted))


def _plans_table(plans: list[LayerPlan]) -> Table:
    table = _table(f"a page is {page_size()} tokens")
    rows = [_flat({"layer": layer, **asdict(plan)}) for layer, plan in enumerate(plans)]
    for column in rows[0]:
        table.add_column(column.replace("_", " "))
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    return table


def _flat(plan: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in plan.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat


def _cell(value: object) -> str:
    words = {True: "yes", False: "no", None: "never"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _lengths_table(plan: LayerPlan, lengths: list[int]) -> Table:
    from hip_sglang.explain import StepAt, in_short

    table = _table("a prompt of each length, and one decode step at its end")
    pruned = "dropped" if plan.pages.remainder == "none" else "estimated"
    for column in ("length", "prefill", "decode", "tokens exact", f"pages {pruned}", "KV read"):
        table.add_column(column, justify="right")
    for step in (StepAt.of(plan, length) for length in lengths):
        table.add_row(
            in_short(step.length),
            f"{step.sparse_queries:.1%} sparse" if step.sparse_queries else "dense",
            "sparse" if step.sparse else "dense",
            f"{step.exact_tokens:,}",
            f"{step.pruned_pages:,}",
            f"{step.share_read:.1%}",
        )
    return table


def _table(title: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(title=title, box=SIMPLE_HEAD, padding=0)


def _print(table: Table, to_stderr: bool = False) -> None:
    from rich.console import Console

    Console(stderr=to_stderr).print(table)
