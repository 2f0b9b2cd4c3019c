"""How far a configuration is from dense on given documents, and what it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hip_sglang.config import HipConfig
from hip_sglang.tune.pruned import Pruned
from hip_sglang.tune.search import Values
from hip_sglang.tune.teacher import Document, Teacher, divergence


@dataclass(frozen=True)
class _Asked:
    document: Document  # read densely, but for its last tokens
    ids: list[int]  # these
    dense: Tensor  # log-probabilities after each [S, vocabulary]


class Judge:
    """Decode steps at the end of documents that were read densely."""

    def __init__(self, teacher: Teacher, pieces: Sequence[list[int]], steps: int) -> None:
        """pieces: token ids of each document; the last ``steps`` of each are asked again."""
        self._teacher = teacher
        dense = plans_of(HipConfig(preset="dense"), teacher)
        self._asked = []
        for ids in pieces:
            document = teacher.read(ids[:-steps], dense, steps)
            tail = ids[-steps:]
            self._asked.append(_Asked(document, tail, teacher.ask(document, tail, dense)))

    def __call__(self, config: HipConfig) -> Values:
        """The KL divergence from dense in nats, and the share of the KV that a step reads."""
        plans = plans_of(config, self._teacher)
        apart = 0.0
        for asked in self._asked:
            found = self._teacher.ask(asked.document, asked.ids, plans)
            apart += float(divergence(asked.dense, found).mean())
        return apart / len(self._asked), plans.share_read


def plans_of(config: HipConfig, teacher: Teacher) -> Pruned:
    return Pruned([config.layer_plan(layer) for layer in range(teacher.layers)])
