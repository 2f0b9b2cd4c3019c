"""Writes docs/numbers.md, and the table of the README, from the rows in benchmarks/results/."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

# a run: its configuration, where it comes from, and its rows by metric
Run = tuple[dict[str, Any], dict[str, str], dict[str, dict[str, str]]]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- numbers: written by `make numbers` -->\n", "<!-- end of numbers -->"


def main() -> int:
    """Rewrite both files."""
    (ROOT / "docs" / "numbers.md").write_text(numbers(), encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


def numbers() -> str:
    """docs/numbers.md, whole."""
    return "\n\n".join(
        [
            "# Numbers",
            "Written by `make numbers` from `benchmarks/results/`. A time says what that machine "
            "did that day; a ratio compares what ran in turn, round by round, in one run.",
            "## One layer's attention",
            "`hip-sglang bench attention`, float32, the default configuration. A context's keys "
            "are random and drift. *Dense* is the better of two dense attentions over contiguous "
            "memory; *keep-all* is our own code with nothing pruned.",
            attention_table(),
            *gpu_section(),
            *serve_section(),
            *offload_section(),
            *prefix_section(),
            *fidelity_section(),
            *eval_section(),
            *cluster_section(),
            "## The demo",
            demo_words(),
            demo_table(),
            "## The slow lane",
            "`make soak`.",
            soak_table(),
        ]
    ) + ("\n")


def with_table(readme: str) -> str:
    """The README with its table as the results have it."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return (
        f"{before}{BEGIN}\n{demo_words()}\n\n{demo_table()}\n\n{attention_words()}\n\n{END}{after}"
    )


def runs(bench: str) -> list[Run]:
    """The newest run of each configuration on each machine; none where there are no rows yet."""
    path = RESULTS / f"{bench}.csv"
    if not path.exists():
        return []
    found: dict[str, dict[str, dict[str, str]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            key = row["machine"] + row["config"]
            if row["metric"] in found.get(key, {}):
                found[key] = {}  # a newer run of the same
            found.setdefault(key, {})[row["metric"]] = row
    return [
        (json.loads(row["config"]), row, metrics)
        for metrics in found.values()
        for row in [next(iter(metrics.values()))]
    ]


def where(row: dict[str, str]) -> str:
    return f"{row['machine']}, {row['cores']} cores; {row['date']}, {row['git_sha']}"


def ratio(row: dict[str, str]) -> str:
    low, middle, high = (float(row[p]) for p in ("p20", "p50", "p80"))
    return f"**{middle:.1f}x** ({low:.1f}-{high:.1f})"


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
    path = RESULTS / "gpu_attention.csv"
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
        "reading without a disk to reading with one behind it.",
        table([*head, "writing behind", "where"], rows),
    ]


def fidelity_section() -> list[str]:
    found = runs("fidelity")
    contexts = [run for run in found if run[0]["part"] == "synthetic"]
    answers = [run for run in found if run[0]["part"] == "model"]
    parts = ["## Fidelity"] if found else []
    for config, row, metrics in contexts:
        means = {}
        for name, of in metrics.items():
            if name.endswith(".mean"):
                generator, who, _ = name.split(".")
                means.setdefault(generator, {})[who] = f"{float(of['p50']):.3f}"
        head = list(next(iter(means.values())))
        parts += [
            f"`hip-sglang bench fidelity`: relative L2 error of a decode step against dense, "
            f"synthetic contexts (`benchmarks/synthetic.py`) of {config['length']:,} tokens, mean "
            f"of {config['seeds']} seeds, ours `{config['hip']}`. *Paper* is HiP's search as "
            "published, *oracle* the truly best tokens, each with as much to attend exactly as "
            f"ours, the rest dropped; *stream* is sink and window alone. {where(row)}.",
            table(["context", *head], [[name, *of.values()] for name, of in means.items()]),
        ]
    if answers:
        rows = []
        for config, row, metrics in answers:
            right, dense = (int(float(metrics[m]["p50"])) for m in ("right", "right.keep_all"))
            task = f"{config['context']:,}, {config['quotes']} quotes of {config['quote_tokens']}"
            steps = config["quotes"] * config["new"]
            counts = [f"{right} of {steps}", f"{dense} of {steps}", f"{right / dense:.3f}"]
            rows.append([task, f"`{config['hip']}`", *counts, where(row)])
        parts += [
            "`--model`: right next tokens of the built-in model, the right past given; decode "
            "steps of the layer that finds the quote, on keys that were read densely.",
            table(
                ["context, quotes", "configuration", "right", "keep-all", "share", "where"], rows
            ),
        ]
    return parts


def eval_section() -> list[str]:
    if not (found := runs("eval")):
        return []

    def score(metrics: dict[str, dict[str, str]], name: str) -> str:
        mean, low, high = (100 * float(metrics[name + of]["p50"]) for of in ("", ".low", ".high"))
        return f"{mean:.1f} ({low:.0f}-{high:.0f})"

    rows = []
    for config, row, metrics in found:
        names = [name.split(".") for name in metrics if name.count(".") == 1]
        model = " ".join(
            [config["model"], *([f"`{json.dumps(config['hip'])}`"] * bool(config["hip"]))]
        )
        for task in dict.fromkeys(task for task, _ in names):
            presets = [preset for of, preset in names if of == task]
            scores = ", ".join(f"{p} {score(metrics, f'{task}.{p}')}" for p in presets)
            samples = str(config["samples"])
            rows.append([f"{config['length']:,}", model, task, samples, scores, where(row)])
    return [
        "## Tasks of long contexts",
        "`hip-sglang eval`: what a model gets right behind the real server, % (95% interval); "
        "under every preset the same samples.",
        table(["tokens", "model", "task", "samples", "right", "where"], rows),
    ]


def cluster_section() -> list[str]:
    if not (found := runs("cluster")):
        return []
    words = {
        "detect_rank_s": "a rank killed, until no client is sent to its group (s)",
        "detect_hang_s": "a rank stopped, until then (s; it is silent for 5 s before)",
        "detect_node_s": "a node killed, until then (s)",
        "recover_s": "from then until the group has machines again, the model not yet loaded (s)",
        "router_p50_ms": "a short request through the router against one direct (ms)",
        "prefix_hit_share": "cached tokens over two replicas against one (share)",
        "imbalance": "tokens read by the busier of the two against the mean",
        "prefix_hit_share_two_routers": "the same share with two routers, each with its own tree",
        "imbalance_two_routers": "and what the busier replica reads then",
        "prefix_hit_share_two_hashing": "the share with two routers that hash (`prefix_hash`)",
        "imbalance_two_hashing": "and what the busier replica reads then",
        "ray_vs_processes": "TP=2 as SGLang's processes against TP=2 as Ray actors, time",
    }
    rows = [
        [words[name], *(f"{float(row[part]):.3g}" for part in ("p20", "p50", "p80")), where(row)]
        for _, _, metrics in found
        for name, row in metrics.items()
    ]
    return [
        "## Many machines",
        "`hip-sglang bench cluster`: Ray nodes on one machine, the built-in model. A time over one "
        "is better for Ray in the last line.",
        table(["what", "p20", "p50", "p80", "where"], rows),
    ]


def demo() -> dict[str, Any]:
    report: dict[str, Any] = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    return report


def demo_words() -> str:
    machine = demo()["provenance"]["machine"]
    return (
        f"`make demo` on {machine['cores']} cores of an {machine['processor']}"
        f"{', no GPU' if machine['accelerator'] is None else ''}; one request alone:"
    )


def demo_table() -> str:
    rows = [
        [
            run["name"],
            f"{run['context'] // 1024}K",
            f"{run['quotes_right']} of {run['quotes']}",
            f"{run['ttft_s']:.0f} s",
            f"{run['decode_tokens_per_s']:.1f}",
            f"{run['kv_read_share']:.1%}",
        ]
        for run in demo()["runs"]
    ]
    head = ["attention", "context", "quotes right", "first token", "tokens/s", "KV read a step"]
    return table(head, rows)


def soak_table() -> str:
    with (RESULTS / "soak.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return table(list(rows[0]), [list(row.values()) for row in rows])


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
