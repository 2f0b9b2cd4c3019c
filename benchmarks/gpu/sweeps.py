"""Cell by cell: what fits, what is timed on it, and the rows that come of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from hip_kernels.layout import SparsePlan

from .cases import MODELS, TINY, Case, Cell
from .clock import Clock, percentiles
from .contestants import Timed, moved, ours
from .dense import Maker, usable
from .rows import Rows

CONTEXTS = [1 << power for power in range(12, 21)]
# from half of the default node_threshold on
NODE_CONTEXTS = CONTEXTS[-4:]
CHUNKS = (32768, 8192)
PREFILLS = [1 << power for power in range(15, 20)]
NODE_CHUNK = 16384
# of HBM3e in an H200, what a kernel can hope for
BYTES_PER_SECOND = 4.0e12
# how often the L2 cache is filled anew before a layer's turn comes again
L2_TURNS = 3
MOST_COPIES = 64
MEMORY_SHARE = 0.7


def cells(mode: str | None, tiny: bool) -> list[Cell]:
    """What is swept, the most telling first: time may run out."""
    if tiny:
        full = torch.float32
        found = [Cell(TINY, full, 1024), Cell(TINY, full, 512, 2), Cell(TINY, full, 1024, 1, 128)]
        found += [Cell(TINY, full, 2048, 1, chunk, nodes=True) for chunk in (1, 64)]
    else:
        half = torch.bfloat16
        found = [Cell(model, half, context) for model in MODELS for context in CONTEXTS]
        found += [
            Cell(model, half, context, nodes=True) for model in MODELS for context in NODE_CONTEXTS
        ]
        found += [
            Cell(model, half, context, 1, chunk)
            for model in MODELS
            for chunk in CHUNKS
            for context in PREFILLS
        ]
        found += [
            Cell(model, half, context, 1, NODE_CHUNK, nodes=nodes)
            for model in MODELS
            for context in PREFILLS[-2:]
            for nodes in (True, False)
        ]
        found += [
            Cell(model, half, context, batch)
            for model in MODELS
            for batch in (4, 16, 64)
            for context in CONTEXTS
        ]
    return [cell for cell in found if mode in (None, "decode" if cell.decodes else "prefill")]


@dataclass
class Sweep:
    """Times cells until a deadline."""

    device: torch.device
    plan: SparsePlan
    rows: Rows
    deadline: float  # of time.monotonic
    say: Callable[[str], None]
    wanted: list[str] | None = None  # of the baselines; None: what the machine has
    failures: list[str] = field(default_factory=list)
    makers: dict[bool, list[tuple[str, Maker]]] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def run(self, found: list[Cell]) -> None:
        left = []
        for cell in found:
            if time.monotonic() > self.deadline:
                left.append(str(cell))
                continue
            try:
                self.cell(cell)
            except torch.cuda.OutOfMemoryError:
                self.say(f"{cell}: left out, out of memory")
            except Exception as error:
                self.failed(str(cell), error)
            if self.on_gpu:
                torch.cuda.empty_cache()
        if left:
            self.say(f"the time is spent; {len(left)} shapes are left out: {'; '.join(left)}")

    def cell(self, cell: Cell) -> None:
        room = self.room(cell)
        if room is None:
            self.say(f"{cell}: left out, the memory is too small for one copy of the KV")
            return
        copies, shared = room
        case = Case.make(cell, self.plan, self.device, copies=copies, shared=shared)
        mine = ours(case)
        timed = self.times(case, self.dense(case) | mine)
        rows = list(self.rows_of(case, timed))
        self.rows.write(rows)
        self.say(f"{cell}: {', '.join(map(_words, rows)) or 'no rows'}")

    def dense(self, case: Case) -> Timed:
        """The baselines of this machine, each on this shape."""
        decodes = case.cell.decodes
        if decodes not in self.makers:
            self.makers[decodes] = [
                *usable(self.device, 1 if decodes else 128, self.wanted, self.say)
            ]
        step = "decode" if decodes else "prefill"
        return {(name, step): maker(case) for name, maker in self.makers[decodes]}

    def times(self, case: Case, calls: Timed) -> dict[tuple[str, str], list[float]]:
        cell, found = case.cell, {}
        for (what, step), call in calls.items():
            try:
                found[what, step] = self.clock(cell)(call, case.layers)
            except torch.cuda.OutOfMemoryError:
                self.say(f"{cell}: {what} left out, out of memory")
            except Exception as error:
                self.failed(f"{what} ({step}) at {cell}", error)
        return found

    def failed(self, what: str, error: Exception) -> None:
        """The other rows are worth having; the run still ends as failed."""
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        self.failures.append(f"{what}: {said}")
        self.say(f"FAILED: {self.failures[-1]}")

    def clock(self, cell: Cell) -> Clock:
        if not self.on_gpu:
            return Clock("wall")
        # the launches of a chunk take no time beside it
        return Clock("graph") if cell.decodes else Clock("events")

    def room(self, cell: Cell) -> tuple[int, bool] | None:
        """How many copies of the KV, and whether the requests of a batch must share theirs."""
        if not self.on_gpu:
            return 1, False
        one = cell.batch * cell.pages * cell.page_bytes
        free = int(MEMORY_SHARE * torch.cuda.mem_get_info(self.device)[0])
        shared = one > free
        if shared:
            one //= cell.batch
        if one > free:
            return None
        if not cell.decodes:
            return 1, shared
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        touched = moved(cell, self.plan, "select", "cached") // (cell.batch if shared else 1)
        wanted = -(-L2_TURNS * cache // max(touched, 1))
        return max(1, min(wanted, MOST_COPIES, free // one)), shared

    def rows_of(
        self, case: Case, timed: dict[tuple[str, str], list[float]]
    ) -> Iterator[dict[str, Any]]:
        cell, model = case.cell, case.cell.model
        medians = {
            what: percentiles(samples)[1]
            for (what, _), samples in timed.items()
            if what.startswith("dense:")
        }
        against = min(medians, key=lambda name: medians[name]) if medians else ""
        for (what, step), samples in timed.items():
            p20, p50, p80 = percentiles(samples)
            bytes_ = moved(cell, self.plan, what, step)
            row = {
                "dtype": str(cell.dtype).removeprefix("torch."),
                "model": model.name, "heads": model.heads, "kv_heads": model.kv_heads,
                "width": model.width, "context": cell.context, "batch": cell.batch,
                "chunk": cell.chunk, "plan": _plan(self.plan, cell), "what": what, "step": step,
                "shared_kv": int(case.shared), "copies": len(case.layers),
                "timing": self.clock(cell).kind,
                "p20_us": f"{p20:.4g}", "p50_us": f"{p50:.4g}", "p80_us": f"{p80:.4g}",
            }  # fmt: skip
            # a part of a step is no attention that could be compared
            if against and (what in ("total", "keep_all") or what.startswith("dense:")):
                row |= {"ratio": f"{medians[against] / p50:.4g}", "against": against}
            if bytes_:
                row["bytes"] = bytes_
                if self.on_gpu and not case.shared:
                    row["share_of_bandwidth"] = f"{1e6 * bytes_ / p50 / BYTES_PER_SECOND:.3g}"
            yield row


def _plan(plan: SparsePlan, cell: Cell) -> str:
    pages = f"{plan.sink_pages}+{plan.window_pages}+{plan.budget_pages}"
    nodes = f", beam of {plan.beam} nodes" if cell.nodes else ""
    return f"{pages} pages, {plan.remainder}, second look {plan.second_look}{nodes}"


def _words(row: dict[str, Any]) -> str:
    ratio = f" ({float(row['ratio']):.1f}x)" if row.get("ratio") else ""
    return f"{row['what']} {row['step']} {float(row['p50_us']):,.1f} us{ratio}"
