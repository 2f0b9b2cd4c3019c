"""What attention did, as Prometheus counters on SGLang's ``/metrics`` (docs/operations.md)."""

from __future__ import annotations

import torch
from hip_kernels.layout import QueryBlocks, Selection
from torch import Tensor


class Telemetry:
    """Counters of one rank, over all of its layers; make it once a process.

    A pass is added up on the device and read once, by ``flush``: a counter must not hold up the
    layers.
    """

    def __init__(self) -> None:
        # SGLang sets the directory that prometheus_client reads when it is imported
        from prometheus_client import Counter

        def counter(name: str, help_text: str, *labels: str) -> Counter:
            return Counter(f"hip_sglang_{name}", help_text, labels)

        self._blocks = counter(
            "query_blocks", "Query blocks by layer that were sparse or dense", "phase", "kind"
        )
        self._choices = counter(
            "choices", "Decode steps by layer that chose pages anew, or used a choice again", "kind"
        )
        self._visible = counter(
            "visible_pages", "Pages that sparse query blocks could see, by layer", "phase"
        )
        self._exact = counter(
            "exact_pages", "Pages that they attended exactly, mean over KV heads", "phase"
        )
        self._chosen = counter(
            "chosen_pages", "Pages among those that were chosen, mean over KV heads", "phase"
        )
        self._estimated = counter(
            "estimated_mass",
            "Share of the softmax that went to estimated pages, mean over rows and heads",
            "phase",
        )
        self._pending: list[tuple[Counter, Tensor]] = []

    def observe(self, blocks: QueryBlocks, selection: Selection | None) -> None:
        """One layer's query blocks, and what was selected for them; None: every page was kept."""
        phase = "decode" if blocks.tokens.shape[1] == 1 else "prefill"
        kind = "dense" if selection is None else "sparse"
        self._blocks.labels(phase, kind).inc(len(blocks))
        if selection is None:
            return
        if phase == "decode":
            self._choices.labels("reused" if blocks.reuses else "fresh").inc(len(blocks))
        real = blocks.position >= 0  # [N, R]
        group = selection.estimated.shape[2] // real.shape[1]
        share = real.repeat_interleave(group, 1) / (real.sum(1, keepdim=True) * group)  # [N, M]
        for metric, value in (
            (self._visible, blocks.page.sum() + len(blocks)),
            (self._exact, per_head(selection.pages)),
            (self._chosen, per_head(selection.choice.pages)),
            (self._estimated, (selection.estimated.mean(1) * share).sum()),
        ):
            self._pending.append((metric.labels(phase), value.double()))

    def flush(self) -> None:
        """Add up what was observed since the last time."""
        if self._pending:
            values = torch.stack([value for _, value in self._pending]).tolist()
            for (metric, _), value in zip(self._pending, values, strict=True):
                metric.inc(value)
            self._pending.clear()


def per_head(pages: Tensor) -> Tensor:
    """pages [N, Hkv, K], -1 is padding -> how many, summed over blocks, mean over heads."""
    return (pages >= 0).sum((0, 2)).double().mean()
