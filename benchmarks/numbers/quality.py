"""How near to dense, and how often right."""

from __future__ import annotations

import json
from typing import Any

from . import saved
from .saved import Run, page_of, runs, table, where


def fidelity_section() -> list[str]:
    lengths = {
        config["length"] for config, _, _ in runs("fidelity") if config["part"] == "synthetic"
    }
    parts = [part for length in sorted(lengths) for part in synthetic_block(length)]
    return ["## Fidelity", *parts, *choice_block()] if runs("fidelity") else []


def synthetic_block(length: int) -> list[str]:
    """Errors on synthetic contexts of one length: a row for each configuration that was tried."""
    found = [run for run in runs("fidelity") if run[0].get("length") == length]
    if not found:
        return []
    rows = []
    for number, (config, _, metrics) in enumerate(found):
        # what does not depend on the configuration is shown once
        others = ("oracle", "paper", "stream") if number == 0 else ()
        for who in (*others, "ours"):
            cells = [
                f"{float(metrics[f'{context}.{who}.mean']['p50']):.3f}"
                f" ({float(metrics[f'{context}.{who}.worst']['p50']):.2f})"
                for context in contexts_of(metrics)
            ]
            rows.append([f"`{config['hip']}`" if who == "ours" else who, *cells])
    config, _, metrics = found[0]
    places = "; ".join(dict.fromkeys(where(row) for _, row, _ in found))
    return [
        f"`hip-sglang bench fidelity`: relative L2 error of a decode step against dense, mean of "
        f"{config['seeds']} seeds and the worst; synthetic contexts (`benchmarks/synthetic.py`) of "
        f"{length:,} tokens. *Oracle* are the truly best tokens, *paper* is HiP's search as "
        f"published, each with as much to attend exactly, the rest dropped; *stream* is sink and "
        f"window alone. {places}.",
        table(["chosen by", *contexts_of(metrics)], rows),
    ]


def contexts_of(metrics: dict[str, dict[str, str]]) -> list[str]:
    return [name.removesuffix(".ours.mean") for name in metrics if name.endswith(".ours.mean")]


def choice_block() -> list[str]:
    """Right next tokens of the built-in model."""
    asked = [run for run in runs("fidelity") if run[0]["part"] == "model"]
    rows = []
    for config, row, metrics in sorted(
        asked, key=lambda run: (run[0]["context"], -run[0]["quote_tokens"])
    ):
        right, dense = (int(float(metrics[m]["p50"])) for m in ("right", "right.keep_all"))
        task = f"{config['context']:,}, {config['quotes']} quotes of {config['quote_tokens']}"
        steps = config["quotes"] * config["new"]
        counts = [f"{right} of {steps}", f"{dense} of {steps}", f"{right / dense:.3f}"]
        rows.append([task, f"`{config['hip']}`", *counts, where(row)])
    if not rows:
        return []
    return [
        "`hip-sglang bench fidelity --model`: right next tokens of the built-in model, the right "
        "past given; decode steps of the layer that finds the quote, on keys that were read "
        "densely. InfiniteHiP's stages have as many tokens as `balanced`.",
        table(["context, quotes", "configuration", "right", "keep-all", "share", "where"], rows),
    ]


def quality_words() -> str:
    """What the built-in model gets right by several methods, where most was asked."""
    told = {"balanced": "ours", "InfiniteHiP": "InfiniteHiP's stages", "paper": "HiP as published"}
    found: dict[tuple[int, int], dict[str, Run]] = {}
    for run in runs("fidelity"):
        if run[0]["part"] == "model" and run[0]["hip"] in told:
            shape = run[0]["context"], run[0]["quote_tokens"]
            found.setdefault(shape, {})[run[0]["hip"]] = run
    whole = [shape for shape, by in found.items() if set(by) == set(told)]
    if not whole:
        return ""
    context, tokens = max(whole)
    by = found[context, tokens]
    config, row, metrics = by["balanced"]
    steps = config["quotes"] * config["new"]
    dense = f"{float(metrics['right.keep_all']['p50']):.0f}"
    right = (f"{name} {float(by[hip][2]['right']['p50']):.0f}" for hip, name in told.items())
    return (
        f"Of {steps} next tokens, in quotes of {tokens} that the built-in model continues in "
        f"decode steps over {context:,} tokens, dense attention gets {dense} right; with as many "
        f"tokens attended exactly by each, {', '.join(right)} ({where(row)})."
    )


def methods_section() -> list[str]:
    parts = [part for contest in ("methods", "ablation") for part in methods_block(contest)]
    about = (
        "`hip-sglang bench methods`: how far the next token's distribution is from dense, when "
        "sink, window and budget are as large for all; *read* is the share of the KV, in bytes, "
        "that a step reads."
    )
    return ["## Methods", about, *parts] if parts else []


def methods_block(contest: str) -> list[str]:
    """Words and a table for each run of one contest."""
    return [
        part
        for config, row, metrics in runs("methods")
        if config["contest"] == contest
        for part in (
            f"{methods_words(config)} {where(row)}.",
            methods_table(config, metrics),
        )
    ]


def overview_block() -> list[str]:
    """KL from dense of the main methods, a row for each length, page and share."""
    shown = (
        "ours", "ours, second look of 8", "ours, pruned dropped",
        "HiP as published", "InfiniteHiP", "Quest", "oracle",
    )  # fmt: skip
    rows = []
    for config, row, metrics in sorted(runs("methods"), key=lambda run: shape_of(run[0])):
        if config["contest"] == "methods" and not config["task"] and not config["own_prefill"]:
            kl = (float(metrics[f"{name}.kl.mean"]["p50"]) for name in shown)
            shape = [config["model"], f"{config['context']:,}", f"{config['share']:.1%}"]
            shape += [str(page_of(config)), str(config["seed"])]
            read = f"{float(metrics['ours.read.mean']['p50']):.1%}"
            rows.append([*shape, read, *(f"{one:.2g}" for one in kl), where(row)])
    head = ["model", "tokens", "attended exactly", "page", "seed", "ours reads", *shown, "where"]
    return [table(head, rows)] if rows else []


def found_block() -> list[str]:
    """What each method answers right, a row for each task, length and share."""
    paired = "ours", "ours, second look of 8"
    others = "dense", "HiP as published", "InfiniteHiP", "Quest", "mean keys", "oracle"
    rows = []
    for config, row, metrics in sorted(runs("methods"), key=lambda run: shape_of(run[0])):
        if config["contest"] == "methods" and config["task"] and not config["own_prefill"]:
            right = {
                name: f"{100 * float(metrics[f'{name}.right.mean']['p50']):.1f}"
                for name in (*others, *paired)
            }
            for name in paired:
                gain, low, high = (
                    100 * float(metrics[f"{name}.{of}.mean"]["p50"])
                    for of in ("gain", "gain_low", "gain_high")
                )
                right[name] += f" ({gain:+.1f}: {low:+.1f} to {high:+.1f})"
            shape = [config["model"], config["task"], f"{config['context']:,}"]
            shape += [f"{config['share']:.1%}", str(page_of(config)), str(config["documents"])]
            rows.append([*shape, *right.values(), where(row)])
    head = ["model", "task", "tokens", "attended exactly", "page", "questions"]
    return [
        "Right, % (in brackets points over dense, with their 95% interval); questions after a "
        "prompt that was read densely.",
        table([*head, *others, *paired, "where"], rows),
    ]


def shape_of(config: dict[str, Any]) -> tuple[str, int, int, float]:
    """What runs are put in order by."""
    return config["model"], -config["context"], page_of(config), config["share"]


def methods_words(config: dict[str, Any]) -> str:
    if config["task"]:
        asked = f"{config['documents']} questions of the task {config['task']}"
    else:
        asked = f"{config['documents']} documents, the last {config['steps']} tokens of each asked"
    read = "by each itself, asked densely" if config["own_prefill"] else "densely"
    read = "and asked by each itself" if config.get("whole") else read
    return (
        f"{config['model']}: {asked}; {config['context']:,} tokens, read {read}, "
        f"{config['share']:.1%} attended exactly by all; our pages have {page_of(config)} tokens."
    )


def methods_table(config: dict[str, Any], metrics: dict[str, dict[str, str]]) -> str:
    def value(name: str) -> float:
        return float(metrics[name]["p50"])

    rows = []
    for name in (name.removesuffix(".kl") for name in metrics if name.endswith(".kl")):
        kl = metrics[f"{name}.kl"]
        row = [
            name,
            f"{value(f'{name}.read.mean'):.1%}",
            f"{value(f'{name}.kl.mean'):.2g}",
            f"{float(kl['p20']):.2g}-{float(kl['p80']):.2g}",
            f"{value(f'{name}.same.mean'):.1%}",
        ]
        if config["task"]:
            gain, low, high = (
                100 * value(f"{name}.{of}.mean") for of in ("gain", "gain_low", "gain_high")
            )
            row += [
                f"{value(f'{name}.right.mean'):.1%}",
                f"{gain:+.1f} ({low:+.1f} to {high:+.1f})",
            ]
        rows.append(row)
    head = ["method", "read", "KL from dense, nats", "p20-p80", "same first token"]
    head += ["right", "points over dense (95%)"] if config["task"] else []
    return table(head, rows)


def eval_section() -> list[str]:
    if not (found := runs("eval")):
        return []

    def score(metrics: dict[str, dict[str, str]], name: str) -> str:
        mean, low, high = (100 * float(metrics[name + of]["p50"]) for of in ("", ".low", ".high"))
        return f"{mean:.1f} ({low:.0f}-{high:.0f})"

    rows = []
    for config, _, metrics in found:
        names = [name.split(".") for name in metrics if name.count(".") == 1]
        model = " ".join(
            [config["model"], *([f"`{json.dumps(config['hip'])}`"] * bool(config["hip"]))]
        )
        for task in dict.fromkeys(task for task, _ in names):
            presets = [preset for of, preset in names if of == task]
            scores = ", ".join(f"{p} {score(metrics, f'{task}.{p}')}" for p in presets)
            shape = [f"{config['length']:,}", model, str(page_of(config)), task]
            # presets may have been asked on different days
            places = "; ".join(dict.fromkeys(where(metrics[f"{task}.{p}"]) for p in presets))
            rows.append([*shape, str(config["samples"]), scores, places])
    return [
        "## Tasks of long contexts",
        "`hip-sglang eval`: what a model gets right behind the real server, % (95% interval); "
        "under every preset the same samples.",
        table(["tokens", "model", "page", "task", "samples", "right", "where"], rows),
    ]


def tuning_section() -> list[str]:
    """What a search found on documents that it has not seen."""
    rows = []
    for config, row, metrics in runs("tuning"):

        def spread(name: str, metrics: dict[str, dict[str, str]] = metrics) -> str:
            low, middle, high = (float(metrics[name][of]) for of in ("p20", "p50", "p80"))
            return f"{middle:.3g} ({low:.3g}-{high:.3g})"

        presets = [name.removesuffix(".dominated") for name in metrics if ".dominated" in name]
        for preset in presets:
            names = "kl", "tuned.kl", "read", "tuned.read", "dominated"
            rows.append(
                [
                    f"{config['model']}, {config['context']:,} tokens, pages of {page_of(config)}",
                    f"{config['trials']}, {config['seeds']} seeds, {config['share']:.3g}",
                    preset,
                    *(spread(f"{preset}.{name}") for name in names),
                    spread("hypervolume.ratio"),
                    where(row),
                ]
            )
    about = (
        "`hip-sglang bench tuning`: the search of `hip-sglang tune`, with sink, window and budget "
        "of the presets a share of the context to begin with, and as many random draws. The "
        "configuration that was nearest to dense of those better than a preset in both is judged, "
        "with the preset, on documents that no search has seen: KL from dense in nats, and the "
        "share of the KV that a step reads. The last ratio is of the areas that both fronts "
        "dominate there, KL in decades below `paper`'s. Medians over seeds (p20-p80)."
    )
    head = ["model", "trials", "preset", "its KL", "tuned", "reads", "tuned", "better in both"]
    head += ["search over chance", "where"]
    return ["## Tuned", about, table(head, rows)] if rows else []


def trained_section() -> list[str]:
    """What the small model has learned, by its log."""
    log = saved.TRAINED / "training.jsonl"
    if not log.exists():
        return []
    first, *steps, last = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    recipe, end = first["recipe"], steps[-1]
    stages = ", ".join(f"{stage['tokens']:,}" for stage in recipe["stages"])
    right = ", ".join(f"{kind} {share:.1%}" for kind, share in end["right"].items())
    return [
        "## The small model",
        f"`python -m benchmarks.train`: a Llama of {first['parameters']:,} parameters "
        f"({recipe['layers']} layers, {recipe['heads']}/{recipe['kv_heads']} heads of 128), "
        f"contexts of {stages} tokens, seed {first['seed']}. Its last report, of step "
        f"{end['step']:,}: {end['tokens']:,} tokens in {end['seconds'] / 60:.0f} minutes; right, "
        f"of what the context decides at {end['stage']:,} tokens: {right}. In the end the "
        f"perplexity of held-out modules of Python's library is {last['perplexity']:.1f} a token. "
        f"{where(first)}.",
    ]
