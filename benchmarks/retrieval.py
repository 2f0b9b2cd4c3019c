"""The built-in model's answers under any attention, without a server.

Layer 0 looks at distances only and is computed as it is; layer 1, which finds the quote, runs
through the kernels as a server's decode steps do, on keys and values that were read densely. The
past is given (teacher forcing), so that one wrong token is one wrong token.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from hip_kernels.layout import PAGE_SIZE
from hip_kernels.stored import PagedKV
from torch import Tensor

from hip_sglang.config import HipConfig, LayerPlan
from hip_sglang.demo.architecture import HEAD_DIM, KV_HEADS, MAX_POSITION, QUERY_HEADS
from hip_sglang.demo.corpus import MINIMUM_TOKENS, Document, library_text
from hip_sglang.demo.exact import ExactDocument, ExactModel, Steps
from hip_sglang.demo.model import write_model
from hip_sglang.demo.quotes import pick_quotes
from hip_sglang.demo.vocabulary import Tokenizer, load_tokenizer
from hip_sglang.tune.teacher import LayerKV

from .attention import Case
from .kept import Kept

MAX_CONTEXT = MAX_POSITION
# tokens after the document, beside those that continue a quote
_ROOM = 64
MIN_CONTEXT = 2 * MINIMUM_TOKENS
_LAYER = 1


@dataclass(frozen=True)
class Task:
    """Quotes to continue, from a document that fills a context."""

    context: int  # tokens
    quote_tokens: int
    quotes: int
    new: int  # tokens that continue each quote

    @property
    def name(self) -> str:
        return f"quotes_{self.quote_tokens}_at_{self.context}"

    @property
    def steps(self) -> int:
        return self.quotes * self.new

    def __str__(self) -> str:
        return f"{self.quotes} quotes of {self.quote_tokens} tokens at {self.context:,}"

    def as_json(self) -> dict[str, int]:
        return asdict(self)


class Cache:
    """Layer 1's keys and values of one document as a pool, with room for a quote behind it."""

    def __init__(self, document: ExactDocument, room: int, means: set[int]) -> None:
        self._tokens = len(document.ids)
        slots = -(-(self._tokens + room) // PAGE_SIZE) * PAGE_SIZE
        kv = PagedKV(*(torch.zeros(slots, KV_HEADS, HEAD_DIM) for _ in "kv"))
        kv.key[: self._tokens] = document.keys.transpose(0, 1)
        kv.value[: self._tokens] = document.values.transpose(0, 1)
        self._cases = {m: Case.of(kv, slots, 1, QUERY_HEADS, m) for m in means}

    def write(self, steps: Steps) -> None:
        """The quote's own tokens behind the document, in place of the last one's."""
        end = steps.keys.shape[1]
        for case in self._cases.values():
            case.kv.key[self._tokens : end] = steps.keys[:, self._tokens :].transpose(0, 1)
            case.kv.value[self._tokens : end] = steps.values[:, self._tokens :].transpose(0, 1)
            case.summarize(self._tokens // PAGE_SIZE, end // PAGE_SIZE)

    def attend(self, steps: Steps, way: LayerPlan | Kept) -> Tensor:
        """Layer 1's output [S, QUERY_HEADS, HEAD_DIM], each step a decode step of its own."""
        if isinstance(way, Kept):
            stored = LayerKV(next(iter(self._cases.values())).kv, {})
            return way.steps(_LAYER, steps.queries, stored, int(steps.visible[0]) - 1)
        case = self._cases[way.means]
        outputs = [
            replace(case, context=visible).ours(way)(query[None])
            for visible, query in zip(steps.visible.tolist(), steps.queries, strict=True)
        ]
        return torch.cat(outputs)


def library_document(tokenizer: Tokenizer, tokens: int) -> Document:
    """Python's library, cut to so many tokens; raises ValueError where it has fewer."""
    document = Document.cut(library_text(), tokenizer, tokens)
    # it ends with a whole line
    if len(document.ids) < 0.9 * tokens:
        raise ValueError(
            f"the document, Python's library, has {len(document.ids):,} tokens, fewer than the "
            f"{tokens:,} that this context takes; give a smaller one"
        )
    return document


@torch.no_grad()
def right_tokens(
    tasks: Sequence[Task], configs: Mapping[str, HipConfig], others: Mapping[str, Kept]
) -> Iterator[tuple[Task, dict[str, int]]]:
    """How many next tokens each configuration, and each other method, gets right, task by task.

    All answer the same steps. Raises ValueError where a document has too few places to quote from.
    """
    plans = {name: config.layer_plan(_LAYER) for name, config in configs.items()}
    ways: dict[str, LayerPlan | Kept] = {**plans, **others}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        model, tokenizer = ExactModel(Path(folder)), load_tokenizer(Path(folder))
    for context, same in groupby(tasks, key=lambda task: task.context):
        group = list(same)
        room = _ROOM + max(task.new + task.quote_tokens for task in group)
        document = library_document(tokenizer, context - room)
        exact = ExactDocument.of(model, document.ids)
        cache = Cache(exact, room, {plan.means for plan in plans.values()})
        for task in group:
            right = dict.fromkeys(ways, 0)
            quotes = pick_quotes(
                document, tokenizer, task.quotes,
                quote_tokens=task.quote_tokens, continuation=task.new,
            )  # fmt: skip
            for quote in quotes:
                steps = exact.teacher_forced(quote.suffix_ids, quote.expected_ids)
                cache.write(steps)
                for name, way in ways.items():
                    logits = model.logits(steps.residual, cache.attend(steps, way))
                    right[name] += int((logits.argmax(-1) == steps.expected).sum())
            yield task, right
