"""SGLang runs a mixed batch as one of prompts; which of its requests are decode steps is kept here.

A prompt that was cached but for its last token brings one token, as a decode step does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


class RequestIds(list[str]):
    """``ForwardBatch.rids``; in an extend the last ``decode_steps`` of them are decode steps.

    SGLang copies a batch by its fields, so an attribute of the batch itself would be lost.
    """

    def __init__(self, names: Iterable[str], decode_steps: int) -> None:
        super().__init__(names)
        self.decode_steps = decode_steps


def init_new(original: Callable[..., Any], cls: type, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``ForwardBatch.init_new``: the scheduler's batch knows its decode steps."""
    made = original(cls, batch, *args, **kwargs)
    if made.rids is not None:
        made.rids = RequestIds(made.rids, len(batch.decoding_reqs or ()))
    return made
