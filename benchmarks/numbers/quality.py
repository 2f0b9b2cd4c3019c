"""How near to dense, and how often right."""

from __future__ import annotations

import json

from .saved import runs, table, where


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


def methods_section() -> list[str]:
    parts = []
    for config, row, metrics in runs("methods"):
        names = [name.removesuffix(".kl") for name in metrics if name.endswith(".kl")]
        rows = [
            [
                name,
                f"{float(metrics[f'{name}.kl.mean']['p50']):.2g}",
                f"{float(metrics[f'{name}.kl']['p20']):.2g}-"
                f"{float(metrics[f'{name}.kl']['p80']):.2g}",
                f"{float(metrics[f'{name}.same.mean']['p50']):.1%}",
            ]
            for name in names
        ]
        parts += [
            f"{config['model']}: {config['documents']} documents of {config['context']:,} tokens, "
            f"the last {config['steps']} of each asked again, {config['share']:.1%} of the context "
            f"attended exactly by all. {where(row)}.",
            table(["method", "KL from dense, nats", "p20-p80", "same first token"], rows),
        ]
    about = (
        "`hip-sglang bench methods`: how far the next token's distribution is from dense, when "
        "sink, window and budget are as large for all; documents are read densely."
    )
    return ["## Methods", about, *parts] if parts else []


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
