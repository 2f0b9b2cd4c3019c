"""A multi-objective evolutionary search (NSGA-II, Deb et al. 2002), which goes on where it ended.

In the spirit of InstaTune (arXiv 2308.15609): a model that is trained already is a super-network,
and its configurations are a population. Two objectives, both to be small.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import optuna

from hip_sglang.config import HipConfig
from hip_sglang.journal import Journal
from hip_sglang.tune.space import Genes, Space

POPULATION = 16
# genes of a child that are any, on average: with fewer, children are often what is known
MUTATIONS = 4
# a search that asks for what it knows so many times in a row is over
MOST_REPEATED = 200
Values = tuple[float, float]


@dataclass(frozen=True)
class Trial:
    """A configuration, and what it was found to be."""

    genes: Genes
    values: Values  # KL divergence from dense in nats, share of the KV that a step reads


class Trials:
    """Trials as they come, in a file that survives a kill. Raises ValueError as ``Journal``."""

    def __init__(self, path: Path) -> None:
        self.journal = Journal(path)
        self.known = [
            Trial(one["genes"], (one["values"][0], one["values"][1])) for one in self.journal.known
        ]

    def add(self, trial: Trial) -> None:
        self.known.append(trial)
        self.journal.add({"genes": trial.genes, "values": trial.values})

    def close(self) -> None:
        """Let others search there."""
        self.journal.close()


def search(
    space: Space,
    judge: Callable[[Genes], Values],
    trials: int,
    found: Trials,
    *,
    seed: int = 0,
    on_trial: Callable[[], None] = lambda: None,
) -> list[Trial]:
    """So many trials; what was found before is not judged again.

    All that is random follows from the seed and from what was found before, so the search takes the
    same way through what was found as it did before, and then goes on. No configuration is tried
    twice; there are fewer trials where it comes to no other ones any more. Raises ValueError where
    the trials are of another search.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    options, tried, configs = space.options(), list[Trial](), set[HipConfig]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optuna calls this crossover experimental
        # options stand in order: a child is between its parents, and not one of both at random
        crossover = optuna.samplers.nsgaii.SBXCrossover()
    sampler = optuna.samplers.NSGAIISampler(
        population_size=POPULATION,
        mutation_prob=MUTATIONS / len(options),
        crossover=crossover,
        seed=seed,
    )
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    for genes in space.start():
        study.enqueue_trial({name: options[name].index(of) for name, of in genes.items()})
    repeated = 0  # in a row
    while len(tried) < trials and repeated < MOST_REPEATED:
        asked = study.ask()
        genes = {name: of[asked.suggest_int(name, 0, len(of) - 1)] for name, of in options.items()}
        if (config := space.config(genes)) in configs:
            study.tell(asked, state=optuna.trial.TrialState.FAIL)
            repeated += 1
            continue
        repeated = 0
        configs.add(config)
        if len(tried) == len(found.known):
            found.add(Trial(genes, judge(genes)))
        tried.append(found.known[len(tried)])
        if tried[-1].genes != genes:
            raise ValueError("the trials that are there are of another search; give another --out")
        study.tell(asked, tried[-1].values)
        on_trial()
    return tried


def front(trials: Iterable[Trial]) -> list[Trial]:
    """Those that no other one is better than in both, by the share they read."""
    found: list[Trial] = []
    for trial in sorted(trials, key=lambda one: (one.values[1], one.values[0])):
        if not found or trial.values[0] < found[-1].values[0]:
            found.append(trial)
    return found


def dominates(one: Values, other: Values) -> bool:
    """Whether one is better in both, or in one and no worse in the other."""
    return one != other and one[0] <= other[0] and one[1] <= other[1]
