"""How long is too long: the times that follow from an endpoint's document."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hip_cluster.spec import EndpointSpec

# a step is one chunk of a prompt at most. a rank that reads fewer tokens a second hangs
SLOWEST_PREFILL = {"cuda": 500, "cpu": 50}
# what may come on top: compiling a kernel, a slow first touch of memory
STEP_ALLOWANCE_S = 20.0
DEFAULT_CHUNK = {"cuda": 8192, "cpu": 4096}


def hang_seconds(spec: EndpointSpec) -> float:
    """With work pending and no step for so long, a rank hangs."""
    if spec.limits.hang_s is not None:
        return spec.limits.hang_s
    device = spec.parallel.device
    return STEP_ALLOWANCE_S + prefill_chunk(spec) / SLOWEST_PREFILL[device]


def prefill_chunk(spec: EndpointSpec) -> int:
    """The tokens of one chunk: ``--chunked-prefill-size``, or what SGLang takes by default."""
    chunk, device = None, spec.parallel.device
    arguments = spec.server.arguments
    for index, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == "--chunked-prefill-size":
            chunk = value or (arguments[index + 1] if index + 1 < len(arguments) else "")
    if chunk is None:
        return DEFAULT_CHUNK[device]
    # -1 switches chunking off: then a step is a whole prompt
    if chunk.isdecimal() and int(chunk) > 0:
        return int(chunk)
    return spec.model.context_length or 131072
