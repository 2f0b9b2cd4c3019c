"""What `bench methods` compares, and what it asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from hip_kernels.layout import PAGE_SIZE

from hip_sglang.config import HipConfig
from hip_sglang.demo.vocabulary import Tokenizer
from hip_sglang.tune.judge import plans_of
from hip_sglang.tune.space import ALWAYS
from hip_sglang.tune.teacher import Attention, Teacher

from .kept import METHODS, Kept, Sizes
from .tasks import Sample

Overrides = Mapping[str, Mapping[str, Any]]
OURS: Overrides = {
    "HiP as published": {"preset": "paper"},
    "ours, pruned dropped": {"remainder": "none"},
    "ours, by means": {"remainder": "mean"},
    "ours": {},
    "ours, second look of 4": {"second_look": 4},
    "ours, second look of 8": {"second_look": 8},
}
ABLATIONS: Overrides = {
    "as it is": {},
    "remainder: none": {"remainder": "none"},
    "remainder: mean": {"remainder": "mean"},
    "remainder: quadratic": {"remainder": "quadratic"},
    "remainder: log_cosh": {"remainder": "log_cosh"},
    "remainder: log_i0": {"remainder": "log_i0"},
    "one mean a page": {"sub_page_means": False},
    "second_look: 0": {"second_look": 0},
    "second_look: 1": {"second_look": 1},
    "second_look: 4": {"second_look": 4},
    "second_look: 8": {"second_look": 8},
    "top_p: 0.95": {"top_p": 0.95},
    "top_p: 0.9": {"top_p": 0.9},
    "refresh: 2": {"refresh": 2},
    "refresh: 4": {"refresh": 4},
    "refresh: 8": {"refresh": 8},
    "first layer dense": {"dense_layers": [0]},
    "HiP, estimated": {"preset": "paper", "remainder": "harmonic"},
}
CONTESTS: dict[str, Overrides] = {"methods": OURS, "ablation": ABLATIONS}


class Contestant(Attention, Protocol):
    """A way to attend that knows what its decode steps read."""

    @property
    def share_read(self) -> float: ...


@dataclass(frozen=True)
class Asked:
    """A document, and what is asked at its end, token by token."""

    ids: list[int]  # read
    tail: list[int]  # decode steps
    answer: list[int] | None  # the token after each of the tail's, where only one is right

    @classmethod
    def of_text(cls, ids: list[int], steps: int) -> Asked:
        """The last ``steps`` tokens of a text again."""
        return cls(ids[:-steps], ids[-steps:], None)

    @classmethod
    def of_sample(cls, sample: Sample, tokenizer: Tokenizer) -> Asked:
        """The answer of a task's question. Raises ValueError where there are several."""
        if len(sample.answers) > 1:
            raise ValueError(
                f"an answer of this task is {len(sample.answers)} in any order; ask a server, by "
                "`hip-sglang eval`"
            )
        said = f"{sample.between}{sample.answers[0]}"
        answer = tokenizer.encode(said, add_special_tokens=False).ids
        return cls(list(sample.ids[:-1]), [sample.ids[-1], *answer[:-1]], answer)


def sizes_of(context: int, share: float) -> Sizes:
    """Sink, window and budget, in whole pages, of at most a share of the context.

    The query's own page is one of them. Raises ValueError where there is no page for each.
    """
    pages = int(context * share) // PAGE_SIZE
    if pages < 4:
        raise ValueError(
            f"--share {share:g} of --context {context} is less than four pages of {PAGE_SIZE}; "
            "give more"
        )
    window = max(1, pages // 4)
    # beside the sink, and the page that a query stands in
    return Sizes(PAGE_SIZE, window * PAGE_SIZE, (pages - window - 2) * PAGE_SIZE)


def contestants(
    contest: str, sizes: Sizes, teacher: Teacher, *, own_prefill: bool
) -> dict[str, Contestant]:
    """By name; other people's methods are for decode steps alone.

    Theirs have the tokens of our own page in their window.
    """
    given = {"sink": sizes.sink, "window": sizes.window, "budget": sizes.budget, **ALWAYS}
    found: dict[str, Contestant] = {
        name: plans_of(HipConfig.load({**given, **more}), teacher)
        for name, more in CONTESTS[contest].items()
    }
    if contest == "methods" and not own_prefill:
        theirs = Sizes(sizes.sink, sizes.window + PAGE_SIZE, sizes.budget)
        found |= {name: Kept(method, theirs) for name, method in METHODS.items()}
    return found
