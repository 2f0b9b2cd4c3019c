"""What attention did, as Prometheus counters on SGLang's ``/metrics`` (docs/operations.md)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hip_kernels.layout import Choice, QueryBlocks, Selection, SparsePlan
from hip_kernels.page_cache import Counts
from hip_kernels.steps import DecodeSteps
from torch import Tensor

# passes between two looks at what decode steps added up: each look waits for the device
PASSES_A_LOOK = 64


@dataclass(frozen=True)
class Traffic:
    """What moved between host memory and the device since the last look."""

    counts: list[int]  # by ``Counts``, over all layers
    page_bytes: int  # of one page of one KV head
    written_bytes: int
    device_share: float  # of the slots hold a page


class Telemetry:
    """Counters of one rank, over all of its layers; make it once a process.

    A pass is added up on the device and read once, by ``flush``: a counter must not hold up the
    layers.
    """

    def __init__(self) -> None:
        # SGLang sets the directory that prometheus_client reads when it is imported
        from prometheus_client import Counter, Gauge

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
        self._offload = {
            Counts.CHOSEN: counter(
                "offload_chosen_pages", "Pages that searches chose, by layer and KV head"
            ),
            Counts.HELD: counter(
                "offload_held_pages", "Pages among those that the device held already"
            ),
            Counts.FETCHED: counter(
                "offload_fetched_pages", "Pages that were copied to the device"
            ),
            Counts.ESTIMATED: counter(
                "offload_estimated_pages", "Chosen pages that were left to the remainder instead"
            ),
            Counts.STALLS: counter(
                "offload_stalls", "Times that a KV head of a layer waited for pages"
            ),
        }
        self._fetched_bytes = counter(
            "offload_fetched_bytes", "Bytes of keys and values that were copied to the device"
        )
        self._written_bytes = counter(
            "offload_written_bytes", "Bytes of keys and values that were written to host memory"
        )
        self._device_share = Gauge(
            "hip_sglang_offload_device_used_share",
            "Share of the device's page slots that hold a page",
            multiprocess_mode="mostrecent",
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
            (self._exact, selection.exact.sum(0).double().mean()),
            (self._chosen, selection.chosen.sum(0).double().mean()),
            (self._estimated, (selection.estimated.mean(1) * share).sum()),
        ):
            self._pending.append((metric.labels(phase), value.double()))

    def observe_steps(self, totals: DecodeTotals) -> None:
        """What passes of decode steps added up since the last time."""
        for metric, value in zip(
            (
                self._blocks.labels("decode", "sparse"),
                self._blocks.labels("decode", "dense"),
                self._choices.labels("fresh"),
                self._choices.labels("reused"),
                self._visible.labels("decode"),
                self._exact.labels("decode"),
                self._chosen.labels("decode"),
                self._estimated.labels("decode"),
            ),
            totals.read(),
            strict=True,
        ):
            metric.inc(value)

    def observe_offload(self, traffic: Traffic) -> None:
        """What the cache of pages did since the last time."""
        for name, value in zip(Counts, traffic.counts, strict=True):
            self._offload[name].inc(value)
        self._fetched_bytes.inc(traffic.counts[Counts.FETCHED] * traffic.page_bytes)
        self._written_bytes.inc(traffic.written_bytes)
        self._device_share.set(traffic.device_share)

    def flush(self) -> None:
        """Add up what was observed since the last time."""
        if self._pending:
            values = torch.stack([value for _, value in self._pending]).tolist()
            for (metric, _), value in zip(self._pending, values, strict=True):
                metric.inc(value)
            self._pending.clear()


class DiskTelemetry:
    """Counters of one rank's pages on disk; make it once a process."""

    def __init__(self) -> None:
        from prometheus_client import Counter, Gauge

        self._pages = Counter(
            "hip_sglang_disk_pages",
            "Pages of KV that were written to disk, read from it, skipped because it was behind or "
            "refused them, or found broken",
            ["kind"],
        )
        self._bytes = Counter("hip_sglang_disk_bytes", "Bytes written or read", ["kind"])
        self._seconds = Counter(
            "hip_sglang_disk_seconds",
            "Seconds spent writing, behind requests, or reading",
            ["kind"],
        )
        self._used = Gauge(
            "hip_sglang_disk_used_bytes", "Bytes on disk", multiprocess_mode="mostrecent"
        )

    def observe(self, kind: str, pages: int, moved: int, seconds: float, used: int) -> None:
        """kind: written, read, skipped or broken; moved: bytes; used: bytes on disk by now."""
        self._pages.labels(kind).inc(pages)
        if kind in ("written", "read"):
            self._bytes.labels(kind).inc(moved)
            self._seconds.labels(kind).inc(seconds)
        self._used.set(used)


class DecodeTotals:
    """What passes of decode steps did, added up on the device, where a CUDA graph does it, too."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(8, dtype=torch.float64, device=device)
        self._read = [0.0] * 8
        self._estimated: list[Tensor] = []
        self._reused: list[Tensor] = []
        self._chosen: list[Tensor] = []
        self._full: dict[int, int] = {}  # layers by budget, where a choice is all of it

    def add(self, steps: DecodeSteps, choice: Choice, estimated: Tensor, plan: SparsePlan) -> None:
        """A layer that may prune: estimated [B, Hq]."""
        self._estimated.append(estimated)
        self._reused.append(steps.reuses)
        if plan.top_p < 1:
            count = (choice.entries[steps.row] >= 0).sum(-1) / plan.parts
            self._chosen.append(count.double().mean(-1))
        else:
            budget = choice.entries.shape[2] // plan.parts
            self._full[budget] = self._full.get(budget, 0) + 1

    def end_pass(self, steps: DecodeSteps, layers: int, plan: SparsePlan) -> None:
        """Of ``layers`` in all: add up what those that may prune did; ``plan`` is one of theirs."""
        pruning = len(self._estimated)
        # padding of a graph stands at a position that no decode step has
        real = steps.position > 0
        sparse = (real & (steps.page >= steps.sparse_from)).double()  # [B]
        blocks = sparse.sum() * pruning
        reused = chosen = estimated = sparse.sum() * 0
        if pruning:
            reused = (torch.stack(self._reused).sum(0) * sparse).sum()
            between = (steps.page - plan.sink_pages - plan.window_pages).double()
            some = [between.clamp(0, budget) * count for budget, count in self._full.items()]
            chosen = (torch.stack([*self._chosen, *some]).sum(0) * sparse).sum()
            estimated = (torch.stack(self._estimated).double().mean(-1).sum(0) * sparse).sum()
        fixed = plan.sink_pages + plan.window_pages + 1
        self._sums += torch.stack(
            [
                blocks,
                real.sum() * layers - blocks,
                blocks - reused,
                reused,
                ((steps.page + 1) * sparse).sum() * pruning,
                chosen + fixed * blocks,
                chosen,
                estimated,
            ]
        )
        for kept in (self._estimated, self._reused, self._chosen):
            kept.clear()
        self._full.clear()

    def read(self) -> list[float]:
        """What was added since the last time; waits for the device."""
        before, self._read = self._read, self._sums.tolist()
        return [now - then for now, then in zip(self._read, before, strict=True)]
