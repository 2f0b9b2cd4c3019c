"""How long a call takes on a device: by CUDA graph, by CUDA events, or by the wall."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from .cases import Layer

Call = Callable[[Layer], object]
LEAST_CALLS = 4  # of a graph


@dataclass(frozen=True)
class Clock:
    """Times calls over layers in turn; ``seconds`` is what it would like to spend on one."""

    kind: Literal["graph", "events", "wall"]
    seconds: float = 0.15

    def __call__(self, call: Call, layers: Sequence[Layer]) -> list[float]:
        """Microseconds a call, a sample each."""
        if self.kind == "wall":
            start = time.perf_counter()
            call(layers[0])
            return [1e6 * (time.perf_counter() - start)]
        _warm_up(call, layers)
        if self.kind == "events":
            return self.samples(lambda: [call(layer) for layer in layers], 3, 10, len(layers))
        layers = [*layers] * -(-LEAST_CALLS // len(layers))
        graph = _captured(call, layers)
        return self.samples(graph.replay, 5, 40, len(layers))

    def samples(self, run: Callable[[], object], least: int, most: int, calls: int) -> list[float]:
        found = [_elapsed(run)]
        count = min(max(int(1e6 * self.seconds / max(found[0], 1.0)), least), most)
        found += [_elapsed(run) for _ in range(count - 1)]
        return [sample / calls for sample in found]


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    shares = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    found = torch.tensor(samples, dtype=torch.float64).quantile(shares).tolist()
    return found[0], found[1], found[2]


def _warm_up(call: Call, layers: Sequence[Layer]) -> None:
    """Compile, and allocate what is kept, on the kind of stream that a graph is captured on."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for layer in layers:
            call(layer)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def _captured(call: Call, layers: Sequence[Layer]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            call(layer)
    # the first replay also uploads it
    graph.replay()
    return graph


def _elapsed(run: Callable[[], object]) -> float:
    """Microseconds."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1e3 * float(start.elapsed_time(end))
