"""What a configuration will do at a given length: the words and numbers of ``config explain``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hip_kernels.layout import NODE_PAGES, PAGE_SIZE

from hip_sglang.config import HipConfig, LayerPlan

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}
# no model reads so much; a slip of the keyboard should not become a table
_LONGEST = 1 << 30


@dataclass(frozen=True)
class StepAt:
    """The decode step whose token is the last of ``length``, and the prompt of that length."""

    length: int
    sparse_queries: float  # of the prompt's positions, the share that prunes
    sparse: bool  # whether the decode step prunes
    exact_tokens: int  # that the decode step attends exactly, its own included
    pruned_pages: int  # and the pages that it does not
    share_read: float  # of the KV, in bytes

    @classmethod
    def of(cls, plan: LayerPlan, length: int) -> StepAt:
        visible = (length - 1) // PAGE_SIZE  # pages before the token's own
        sparse_at = first_sparse_position(plan.sparse_decode_from)
        sparse = sparse_at is not None and length - 1 >= sparse_at
        # the plan never prunes where the exact pages would hold everything
        exact = plan.pages.exact_pages if sparse else visible + 1
        pruned = visible + 1 - exact
        start = first_sparse_position(plan.sparse_from)
        return cls(
            length=length,
            sparse_queries=0.0 if start is None else max(0, length - start) / length,
            sparse=sparse,
            exact_tokens=length - pruned * PAGE_SIZE,
            pruned_pages=pruned,
            share_read=plan.share_read(visible, exact) if sparse else 1.0,
        )


def first_sparse_position(threshold: int | None) -> int | None:
    """The first position that prunes: a page whose first token is below the threshold does not."""
    return None if threshold is None else -(-threshold // PAGE_SIZE) * PAGE_SIZE


def parse_lengths(text: str) -> list[int]:
    """``4K,8192,1M`` -> tokens, in rising order."""
    return sorted({_tokens(part.strip()) for part in text.split(",")})


def _tokens(text: str) -> int:
    found = re.fullmatch(r"([0-9]{1,10})([KM]?)", text.upper())
    tokens = int(found[1]) * _UNITS[found[2]] if found else 0
    if not 0 < tokens <= _LONGEST:
        raise ValueError(
            f"--lengths {text!r} is not a number of tokens from 1 to 1024M; give lengths such as "
            "8K,128K,1M"
        )
    return tokens


def in_short(tokens: int) -> str:
    """131072 -> 128K."""
    for unit in "MK":
        if tokens % _UNITS[unit] == 0:
            return f"{tokens // _UNITS[unit]}{unit}"
    return f"{tokens:,}"


def plans_of(config: HipConfig, layers: int) -> list[LayerPlan]:
    """The plan of each layer of a model. Raises ValueError where a layer is named that is none."""
    if absent := [named for named in config.named_layers if named[1] >= layers]:
        key, layer = absent[0]
        raise ValueError(
            f"{key} names layer {layer}, but with --layers {layers} they are 0 to "
            f"{layers - 1}; take it out, or give the model's number with --layers"
        )
    return [config.layer_plan(layer) for layer in range(layers)]


def grouped(plans: Sequence[LayerPlan]) -> list[tuple[str, LayerPlan]]:
    """("layers 0-2, 5", plan): layers of equal plans together."""
    members: dict[LayerPlan, list[int]] = {}
    for layer, plan in enumerate(plans):
        members.setdefault(plan, []).append(layer)
    return [(_name(layers), plan) for plan, layers in members.items()]


def _name(layers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    spans = ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)
    return f"layer{'s' if len(layers) > 1 else ''} {spans}"


def sentences(plan: LayerPlan) -> list[str]:
    """What a layer does, in plain words."""
    prefill, decode = map(first_sparse_position, (plan.sparse_from, plan.sparse_decode_from))
    found = [f"prefill: {_phase(prefill)}", f"decode: {_phase(decode)}"]
    if not plan.prunes:
        return found
    pages = plan.pages
    parts = {
        "sink": pages.sink_pages,
        "window": pages.window_pages,
        "budget": pages.budget_pages,
        "own page": 1,
    }
    sizes = " + ".join(f"{name} {count * PAGE_SIZE:,}" for name, count in parts.items() if count)
    found.append(
        f"a sparse query attends exactly to {sizes} = {pages.exact_pages * PAGE_SIZE:,} tokens"
    )
    return [*found, *_search(plan), _rest(plan)]


def _phase(start: int | None) -> str:
    if start is None:
        return "dense at every position"
    return f"dense at positions below {start:,}, sparse from there"


def _search(plan: LayerPlan) -> list[str]:
    pages = plan.pages
    if pages.strategy == "tree":
        return ["the budget is filled by HiP's published search, which reads single keys"]
    found = ["the budget is filled by the summaries of all pages"]
    if pages.second_look and plan.sparse_decode_from is not None:
        looked = pages.second_look * pages.budget_pages * PAGE_SIZE
        found[0] += f"; a decode step then looks at up to {looked:,} keys"
        if pages.parts > 1:
            found[0] += f", and fills it by {PAGE_SIZE // pages.parts} tokens"
    if plan.refresh > 1 and plan.sparse_decode_from is not None:
        found.append(
            f"decode steps choose anew every {plan.refresh} tokens, and keep their choice between"
        )
    if plan.nodes_from is not None:
        found.append(
            f"sparse queries at positions from {first_sparse_position(plan.nodes_from):,} weigh "
            f"nodes of {NODE_PAGES * PAGE_SIZE} tokens, and the pages of the {pages.beam} heaviest"
        )
    return found


def _rest(plan: LayerPlan) -> str:
    if plan.pages.remainder == "none":
        return "all other pages are dropped"
    means = "mean key" if plan.means == 1 else f"{plan.means} mean keys"
    kind = plan.pages.remainder
    guard = "" if kind == "mean" else f" and the spread about them ({kind})"
    return f"every other page is estimated, as one key each, from its {means}{guard}"
