"""The arithmetic of ``hip-sglang bench cluster``; what it measures is run by the slow lane."""

import pytest

from hip_sglang.bench import load_bench


@pytest.fixture(scope="module")
def cluster():
    return load_bench("cluster")


def test_the_interval_of_a_median_holds_it(cluster):
    low, high = cluster.interval([0.9, 0.95, 1.0, 1.05, 1.1] * 4)
    assert 0.9 <= low <= 1.0 <= high <= 1.1
    assert cluster.interval([1.0] * 20) == (1.0, 1.0)


def test_the_ratio_of_ray_has_its_interval_and_the_rest_are_values(cluster):
    found = cluster.summary({"detect_rank_s": [0.2], "ray_vs_processes": [0.9, 1.0, 1.1]})
    assert found["ratios"] == {"ray_vs_processes": 1.0}
    assert set(found["values"]) == {
        "detect_rank_s",
        "ray_vs_processes_low",
        "ray_vs_processes_high",
    }


def test_each_of_a_pair_is_first_in_turn_and_the_ratio_says_whose_time_is_longer(cluster):
    order = []

    def run(name, seconds):
        order.append(name)
        return seconds

    ratios = cluster.interleaved(lambda: run("a", 2.0), lambda: run("b", 1.0), 4)
    assert ratios == [2.0] * 4
    assert order[2:] == ["a", "b", "b", "a", "a", "b", "b", "a"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parts", "fault"], "--parts fault is not one of faults, router, locality, ray"),
        (["--pairs", "1"], "--pairs 1 is too small; give 2 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(cluster, arguments, said):
    with pytest.raises(ValueError, match=said):
        cluster.main(arguments)
