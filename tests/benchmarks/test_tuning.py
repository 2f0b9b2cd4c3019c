"""`bench tuning`: what it counts, by hand, and a small run of it."""

from __future__ import annotations

import json

import pytest

from benchmarks.tuning import drawn, hypervolume, main, nearest
from hip_sglang.config import HipConfig
from hip_sglang.tune.search import Trial
from hip_sglang.tune.space import Space


def test_an_area_by_hand() -> None:
    # a decade below the worst at half of the bytes, and another one at nine tenths
    values = [(0.1, 0.5), (0.01, 0.9), (0.5, 0.95)]
    assert hypervolume(values, (1.0, 1.0)) == pytest.approx(1 * 0.5 + 1 * 0.1)
    # what is beyond the worst counts for nothing, and dense is no better than the least
    assert hypervolume([(2.0, 0.1), (0.1, 1.5)], (1.0, 1.0)) == 0
    assert hypervolume([(0.0, 0.0)], (1.0, 1.0)) == pytest.approx(6)


def test_chance_begins_with_what_one_would_try_by_hand() -> None:
    space = Space.of(HipConfig(), layers=2, prompt=8192)
    start = space.uniform()
    assert drawn(space, 3, seed=0) == start[:3]
    more = drawn(space, len(start) + 5, seed=0)
    assert more[: len(start)] == start
    assert more != drawn(space, len(start) + 5, seed=1)
    assert all(genes[name] in of for genes in more for name, of in space.options().items())


def test_the_nearest_of_what_is_better_in_both() -> None:
    found = [Trial({"n": n}, of) for n, of in enumerate([(0.1, 0.1), (0.01, 0.2), (0.001, 0.4)])]
    assert nearest(found, (0.02, 0.3)) == found[1]
    assert nearest(found, (0.2, 0.3)) == found[1]
    assert nearest(found, (1.0, 0.05)) is None


def test_a_small_run(capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--context", "512", "--share", "0.5", "--steps", "4", "--trials", "4", "--seeds", "1"]
    assert main(["--model", "trained", *more, "--json"]) == 0
    values = json.loads(capsys.readouterr().out.splitlines()[-1])["values"]
    assert 0 < values["balanced.kl"] < values["paper.kl"]
    # chance begins with dense layers, the search with what each layer is worth
    assert values["hypervolume.ratio"] > 1
