"""``hip-sglang plan``: what offloaded KV of a model takes, before anything is started."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hip_sglang.cli_errors import CliError, one_line_errors

if TYPE_CHECKING:
    from hip_sglang.config import HipConfig
    from hip_sglang.kv.memory import MemoryPlan

GIB = 1 << 30
# assumed of a GPU: so much is for weights and KV, the rest for activations and graphs; SGLang
# decides by the machine, and the server's own line at its start is exact
STATIC_SHARE = 0.85
ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1}


def plan(
    model: Annotated[Path, typer.Option(help="A model's directory, with its config.json.")],
    host_gib: Annotated[float, typer.Option(help="Host memory for KV, of all ranks.")],
    gpu_gib: Annotated[float | None, typer.Option(help="Memory of one GPU; none: a CPU.")] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 1,
    running: Annotated[int, typer.Option(min=1, help="Requests at once, at most.")] = 256,
    kv_dtype: Annotated[str, typer.Option(help=f"auto, {', '.join(ITEMSIZES)}.")] = "auto",
    hip_config: Annotated[str | None, typer.Option(help="As of the server.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what KV in host memory takes, on the host and on each device."""
    from hip_sglang.config import HipConfig
    from hip_sglang.kv.memory import KVShape, MemoryPlan

    with one_line_errors():
        described = _described(model)
        dtype = kv_dtype if kv_dtype != "auto" else str(described.get("dtype") or "bfloat16")
        if dtype not in ITEMSIZES:
            raise CliError(f"--kv-dtype {dtype} is not known; choose one of {', '.join(ITEMSIZES)}")
        config = HipConfig.load(hip_config)
        offload = {"host_gib": host_gib, **_given(config)}
        config = HipConfig.load({**config.model_dump(exclude_unset=True), "offload": offload})
        shape = KVShape.of(described, ITEMSIZES[dtype], tp)
        weights = sum(file.stat().st_size for file in model.glob("*.safetensors")) // tp
        device = None if gpu_gib is None else int(gpu_gib * GIB * STATIC_SHARE) - weights
        found = MemoryPlan.of(
            shape,
            config,
            host_bytes=int(host_gib * GIB) // tp,
            context=int(described.get("max_position_embeddings") or 1 << 20),
            running=running,
            device_bytes=device,
        )
    if as_json:
        print(json.dumps({**asdict(found), "weight_bytes": weights, "ranks": tp}))
        return
    _print(found, weights, tp)


def _described(model: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CliError(
            f"--model {model}: no config.json to read there ({error}); name a model's directory"
        ) from None
    # older files have the older word
    text = found.get("text_config") or found
    text.setdefault("dtype", text.get("torch_dtype"))
    return text


def _given(config: HipConfig) -> dict[str, Any]:
    """What a configuration says of offload beside how much host memory there is."""
    if config.offload is None:
        return {}
    return config.offload.model_dump(exclude_unset=True, exclude={"host_gib"})


def _print(found: MemoryPlan, weights: int, tp: int) -> None:
    table = Table(title=f"each of {tp} ranks" if tp > 1 else None)
    for heading in ("", "tokens", "GiB"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, tokens, size in (
        ("host: all KV", found.logical_tokens, found.host_bytes),
        ("device: copies of pages", found.device_tokens, found.cache_bytes),
        ("device: summaries", None, found.summary_bytes),
        ("device: tables", None, found.table_bytes),
        ("device: weights", None, weights),
    ):
        table.add_row(name, "" if tokens is None else f"{tokens:,}", f"{size / GIB:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"one request has up to {found.logical_tokens:,} tokens; "
        f"{found.running} run at once at most"
    )
