"""What can be tuned, and how it becomes a configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hip_kernels.layout import PAGE_SIZE

from hip_sglang.config import HipConfig

# calibration contexts are short: what prunes at all is to prune there
ALWAYS = {"dense_threshold": 0}

Genes = dict[str, Any]
# layers next to each other that share their settings, at most so many
MOST_GROUPS = 8
# of the budget that is given
SCALES = (1 / 8, 1 / 4, 1 / 2, 1, 2)
# of the window
WINDOWS = (1 / 4, 1 / 2, 1)
SHARES = (1.0, 0.99, 0.95, 0.9)
REFRESHES = (1, 2, 4, 8)
LOOKS = (0, 1, 2, 3, 4, 6, 8)
# what layers can have of their own, and what all share
OWN = ("budget", "top_p", "refresh", "second_look")
SHARED = ("window", "sub_page_means")


@dataclass(frozen=True)
class Space:
    """Per group of layers a budget, ``top_p``, ``refresh`` and second look, or dense altogether.

    All layers have one window, and as many means a page. A second look is not searched for where
    the strategy has none. With offload neither it nor dense layers are: both read keys all over
    the host's memory.
    """

    base: HipConfig
    groups: tuple[tuple[int, ...], ...]
    prompt: int  # tokens before those that are asked, at the shortest length

    @classmethod
    def of(cls, base: HipConfig, layers: int, prompt: int) -> Space:
        """The layers of a model in order, in groups of nearly the same size.

        Raises ValueError where the configuration decides for single layers already, or where its
        decode steps do not prune after such a prompt.
        """
        if base.decode == "dense":
            raise ValueError("decode=dense prunes nothing; tune a configuration that does")
        if base.named_layers:
            raise ValueError("per_layer and dense_layers are what is searched for; leave them out")
        if (start := _start(base, base.budget)) > prompt:
            raise ValueError(
                f"sink, window and budget hold all of a prompt of {prompt:,} tokens: pruning "
                f"begins at {start:,}; give longer --lengths, or a --hip-config with less"
            )
        count = min(MOST_GROUPS, layers)
        ends = [round(layers * part / count) for part in range(count + 1)]
        return cls(base, tuple(tuple(range(first, end)) for first, end in pairwise(ends)), prompt)

    def options(self) -> dict[str, Sequence[Any]]:
        """What each gene can be."""
        budgets, windows = (
            sorted({max(PAGE_SIZE, int(size * scale)) for scale in scales})
            for size, scales in ((self.base.budget, SCALES), (self.base.window, WINDOWS))
        )
        # one layer's budget decides for all from where on they prune
        budgets = [budget for budget in budgets if _start(self.base, budget) <= self.prompt]
        plan = self.base.layer_plan(0)
        several = (False, True) if plan.pages.reads_summaries else (self.base.sub_page_means,)
        resident = self.base.offload is None
        looks = resident and self.base.strategy == "summary"
        choices: dict[str, Sequence[Any]] = {
            "budget": budgets,
            "top_p": sorted({*SHARES, self.base.top_p}, reverse=True),
            "refresh": sorted({*REFRESHES, self.base.refresh}),
            "second_look": sorted(
                {*LOOKS, self.base.second_look} if looks else {self.base.second_look}
            ),
            "dense": (False, True) if resident else (False,),
        }
        return {
            "window": windows,
            "sub_page_means": several,
            **{
                f"{name}.{group}": options
                for group in range(len(self.groups))
                for name, options in choices.items()
            },
        }

    def uniform(self) -> list[Genes]:
        """What is the same for all layers, and one would try by hand; first what is given."""
        return self._genes(self._plain())

    def start(self) -> list[Genes]:
        """What a search begins with: the same, and what shows which groups matter."""
        return self._genes([{}, *self._single(), *self._plain()])

    def _plain(self) -> list[Genes]:
        """Changes of all groups."""
        options = self.options()
        sizes = [{"budget": budget} for budget in options["budget.0"]]
        # a smaller window with as much less of a budget
        sizes += [
            {"window": self.base.window * scale, "budget": self.base.budget * scale}
            for scale in WINDOWS
        ]
        looks = [
            {**size, "second_look": look, "sub_page_means": means}
            for size in sizes
            for look in (self.base.second_look, LOOKS[0], LOOKS[-1])
            for means in options["sub_page_means"]
        ]
        return [{}, {"dense": True}, {"refresh": 4}, {"top_p": 0.95}, *looks]

    def _single(self) -> list[Genes]:
        """One group reads as little as can be; or all others do, and it reads what it did, or more.

        Layers differ much in what pruning them costs, and few of them may matter.
        """
        options, groups = self.options(), range(len(self.groups))
        least = {"budget": options["budget.0"][0], "second_look": options["second_look.0"][0]}
        found: list[Genes] = []
        for group in groups:
            others = {f"{name}.{n}": least[name] for n in groups if n != group for name in least}
            found += [
                {f"{name}.{group}": value for name, value in least.items()},
                others,
                {**others, f"second_look.{group}": options["second_look.0"][-1]},
            ]
        return found

    def _genes(self, changes: Iterable[Genes]) -> list[Genes]:
        """What is given, but for changes of all groups ("budget") or of one ("budget.2")."""
        given = {"dense": False, **{name: getattr(self.base, name) for name in (*OWN, *SHARED)}}
        found: list[Genes] = []
        for change in changes:
            wanted = {**given, **change}
            genes = {
                gene: min(
                    of, key=lambda one: abs(one - wanted.get(gene, wanted[gene.partition(".")[0]]))
                )
                for gene, of in self.options().items()
            }
            if genes not in found:
                found.append(genes)
        return found

    def config(self, genes: Mapping[str, Any], **more: Any) -> HipConfig:
        """With ``more`` settings in place of those given."""
        dense: list[int] = []
        own = []
        for number, layers in enumerate(self.groups):
            if genes[f"dense.{number}"]:
                dense += layers
                continue
            own.append({"layers": layers, **{name: genes[f"{name}.{number}"] for name in OWN}})
        given = self.base.model_dump(exclude_unset=True)
        shared = {name: genes[name] for name in SHARED}
        return HipConfig.load({**given, **shared, "dense_layers": dense, "per_layer": own, **more})


def _start(base: HipConfig, budget: int) -> int:
    """The position from which on queries are sparse when calibration is: where anything can be."""
    return base.model_copy(update={"budget": budget, **ALWAYS}).start
