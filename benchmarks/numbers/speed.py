"""How fast: attention alone, the server, KV in host memory and on disk."""

from __future__ import annotations

import csv
import json
from typing import Any

from .saved import file_of, ratio, runs, table, where


def attention_table() -> str:
    def cell(metrics: dict[str, dict[str, str]], name: str) -> str:
        if name not in metrics:
            return "-"
        if name.startswith("ratio"):
            return ratio(metrics[name])
        return f"{1e3 * float(metrics[name]['p50']):,.1f} ms"

    rows = [
        [
            f"{config['mode']}, {config['rows']:,} of {config['context']:,}",
            f"{config['heads']}, {config['dim']}",
            *(cell(metrics, name) for name in ("ours", "ratio.vs_best_dense")),
            *(cell(metrics, f"ratio.vs_{name}") for name in ("keep_all", "torch_native")),
            where(row),
        ]
        for config, row, metrics in runs("attention")
    ]
    head = ["rows of context", "heads, dim", "ours", "dense / ours", "keep-all / ours"]
    return table([*head, "torch_native / ours", "where"], rows)


def attention_words() -> str:
    """The README's sentence."""
    for config, _, metrics in runs("attention"):
        if (config["mode"], config["context"]) == ("decode", 131072):
            dense, native = (
                float(metrics[f"ratio.vs_{name}"]["p50"]) for name in ("best_dense", "torch_native")
            )
            return (
                f"One layer's attention in a decode step over {config['context']:,} tokens "
                f"({config['heads']} heads of {config['dim']}, float32, same machine): "
                f"**{dense:.1f}x** as fast as the best dense attention over contiguous memory, "
                f"**{native:.0f}x** SGLang's `torch_native`. More in "
                "[docs/numbers.md](docs/numbers.md)."
            )
    raise ValueError("no decode row at 131072 in attention.csv; hip-sglang bench attention --save")


def gpu_section() -> list[str]:
    """Whole steps only; the parts of each are in the file."""
    path = file_of("gpu_attention.csv")
    if not path.exists():
        return []
    shape = ("device", "model", "context", "batch", "chunk", "plan", "what", "step")
    with path.open(newline="", encoding="utf-8") as file:
        # a newer run of the same takes its place
        newest = {tuple(row[name] for name in shape): row for row in csv.DictReader(file)}
    rows = [
        [
            row["device"],
            f"{row['model']} ({row['heads']}/{row['kv_heads']}/{row['width']})",
            f"{int(row['chunk']):,} of {int(row['context']):,}, batch {row['batch']}",
            f"{row['what']}, {row['step']}; {row['plan']}",
            f"{float(row['p50_us']):,.0f} us",
            f"**{float(row['ratio']):.1f}x** {row['against']}" if row["ratio"] else "-",
            f"{row['date']}, {row['git_sha']}",
        ]
        for row in newest.values()
        if row["what"] in ("total", "keep_all")
    ]
    head = ["GPU", "model", "rows of context", "step", "ours", "fastest dense / ours", "where"]
    return [
        "## One layer's attention on a GPU",
        "`python benchmarks/gpu/attention.py`. A *refresh* step chooses, a *cached* one attends to "
        "what was chosen; *keep_all* is our own code with nothing pruned.",
        table(head, rows),
    ]


def growth_section() -> list[str]:
    if not (found := runs("growth")):
        return []
    rows = []
    for config, row, metrics in found:
        for mode in ("decode", "prefill"):
            times = [f"{float(metrics[f'{mode}.{n}']['p50']):,.1f}" for n in config[mode]]
            lengths = ", ".join(f"{n:,}" for n in config[mode])
            power = f"{float(metrics[f'exponent.{mode}']['p50']):.2f}"
            shape = f"{config['heads']}, {config['dim']}"
            rows.append([mode, shape, lengths, ", ".join(times), power, where(row)])
    return [
        "## How cost grows with the context",
        "`hip-sglang bench growth`: one layer's decode step, and the last chunk of a prompt. The "
        "cost of a step, or of a whole prompt, grows as that power of the context.",
        table(["", "heads, dim", "tokens", "ms", "power", "where"], rows),
    ]


def serve_section() -> list[str]:
    if not (found := runs("serve")):
        return []

    def speed(metrics: dict[str, dict[str, str]], name: str) -> str:
        if f"{name}.ttft" not in metrics:
            return "-"
        first, then = (float(metrics[f"{name}.{metric}"]["p50"]) for metric in ("ttft", "decode"))
        return f"{first:,.1f} s, {then:.1f} tokens/s"

    def model(config: dict[str, Any]) -> str:
        name = config.get("model", "built-in")
        return "" if name == "built-in" else f"{name}, "

    def sglang(metrics: dict[str, dict[str, str]]) -> str:
        if "sglang.ttft" not in metrics:
            return "-"
        times = [ratio(metrics[f"ratio.{name}_sglang"]) for name in ("ttft", "decode")]
        return f"{speed(metrics, 'sglang')}: {' and '.join(times)}"

    rows = [
        [
            f"{config['context']:,}",
            model(config) + (f"`{json.dumps(config['hip'])}`" if config["hip"] else "default"),
            speed(metrics, "ours"),
            speed(metrics, "keep_all"),
            *(ratio(metrics[f"ratio.{name}"]) for name in ("ttft", "decode")),
            speed(metrics, "torch_native")
            + (f" at {config['torch_native']:,}" if config["torch_native"] else ""),
            sglang(metrics),
            where(row),
        ]
        for config, row, metrics in found
    ]
    head = ["context", "configuration", "ours: first token, then", "keep-all", "first token"]
    return [
        "## The server",
        "`hip-sglang bench serve`: the built-in model (two layers) on the real server, one request "
        "alone, nothing cached. *Keep-all* is our own code with nothing pruned, at the same "
        "context; the ratios are keep-all's time to ours. *SGLang* is the backend that it chooses.",
        table([*head, "decode", "torch_native", "SGLang", "where"], rows),
    ]


def offload_section() -> list[str]:
    if not (found := runs("offload")):
        return []
    shares = ("float32.all", "bfloat16.all")
    rows = [
        [
            f"{config['context']:,}, 1/{config['share']}",
            *(ratio(metrics[f"ratio.{name}_vs_resident"]) for name in ("decode", "ttft")),
            f"{float(metrics['hit_ratio']['p50']):.0%}",
            f"{float(metrics['bytes_per_token']['p50']) / 2**20:.2f} MiB",
            f"{float(metrics['stall_per_step']['p50']):.1f} ms",
            " and ".join(f"{float(metrics[f'device_bytes_share.{s}']['p50']):.1%}" for s in shares),
            where(row),
        ]
        for config, row, metrics in found
    ]
    head = ["context, on the device", "decode", "first token", "chosen pages held", "fetched"]
    return [
        "## KV in host memory",
        "`hip-sglang bench offload`: the built-in model on the real server, one request alone; the "
        "ratios are the time with all KV resident to the time without. *Held* are, of the pages "
        "that decode steps chose, those that the device had; *fetched* is a token's. *Kept* is "
        "what a rank of Llama-3.1-8B's shape has on the device at 131,072 tokens, its cache for "
        "1/32 of them, of all KV in float32 and in bfloat16: cache, summaries, tables, scratch.",
        table([*head, "stall a step", "kept", "where"], rows),
    ]


def prefix_section() -> list[str]:
    if not (found := runs("prefix")):
        return []
    rows = [
        [
            f"{config['context']:,}",
            *(f"{float(metrics[f'{name}.ttft']['p50']):.3g} s" for name in ("cold", "known")),
            f"{float(metrics['decode.step']['p50']) * 1000:.0f} ms",
            ratio(metrics["ratio.known_vs_step"]),
            ratio(metrics["ratio.known_pass_vs_step"]),
            f"{float(metrics['ratio.restarted_vs_cold']['p50']):.1%}",
            ratio(metrics["ratio.reading_vs_without_disk"]),
            f"{float(metrics['ratio.writing_vs_cold']['p50']):.1%}",
            where(row),
        ]
        for config, row, metrics in found
    ]
    head = ["context", "cold", "known", "a step", "known to a step"]
    head += ["its pass to a step", "after a restart, of cold"]
    return [
        "## Prefixes on disk",
        "`hip-sglang bench prefix`: the built-in model on the real server, one request alone, KV "
        "in host memory and on disk; times are until the first token: of a document read cold, of "
        "one that the tree knows, and of one that a server read that ended since. *Its pass* is "
        "the scheduler's alone: before it all tokens pass the door as JSON. The last ratio is "
        "reading without a disk to reading with one behind it, each by a server that was just "
        "started; the share, how much of the reading one thread writes.",
        table([*head, "writing behind", "one thread writes", "where"], rows),
    ]
