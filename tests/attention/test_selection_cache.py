"""A choice is used again by the steps after it and by nothing else: a stale one is wrong."""

import random

import pytest
import torch
from hip_kernels.layout import Choice

from hip_sglang.attention.selection_cache import SelectionCache

REFRESH, START, ROWS = 4, 256, 5


@pytest.fixture
def cache():
    return SelectionCache(ROWS, 8, REFRESH)


def steps(cache, name, lengths, row=0):
    """Decode steps of one request: which use again what was chosen."""
    return [bool(cache.step([row], [name], [True], [n], START)[0]) for n in lengths]


def test_it_chooses_first_and_then_by_length_alone(cache):
    assert steps(cache, "a", range(1001, 1011)) == [False, True, True, False] + [True] * 3 + [
        False,
        True,
        True,
    ]


def test_a_step_that_is_not_sparse_leaves_nothing(cache):
    # the page from 256 on is the first that is sparse: its first step has nothing to use again
    assert steps(cache, "a", range(254, 262)) == [False] * 4 + [True, True, False, True]


def test_another_owner_of_the_row_chooses_anew(cache):
    steps(cache, "a", [1001])
    assert steps(cache, "b", [1002]) == [False]
    assert steps(cache, "a", [1003]) == [False]


def test_a_prompt_and_a_gap_choose_anew(cache):
    steps(cache, "a", [1001])
    assert steps(cache, "a", [1003]) == [False]
    # the last token of a prompt that was cached but for it
    assert not bool(cache.step([0], ["a"], [False], [1004], START)[0])
    assert steps(cache, "a", [1005, 1006]) == [False, True]


def test_a_request_moves_to_another_row(cache):
    steps(cache, "a", [1001], row=0)
    assert steps(cache, "a", [1002], row=1) == [False]


def test_what_is_kept_is_found_by_row_and_layer(cache):
    cache.keep(3, torch.tensor([4, 1]), Choice(torch.tensor([[[5]], [[7]]]), torch.ones(2, 1, 2)))
    cache.keep(4, torch.tensor([4]), Choice(torch.tensor([[[9]]]), torch.zeros(1, 1, 2)))
    found = cache.get(3, torch.tensor([1, 4]))
    assert found.pages.tolist() == [[[7] + [-1] * 7], [[5] + [-1] * 7]]
    assert found.correction.tolist() == [[[1.0, 1.0]], [[1.0, 1.0]]]
    assert cache.get(4, torch.tensor([4])).pages[0, 0, 0] == 9


@pytest.mark.parametrize("seed", range(5))
def test_no_schedule_makes_it_stale(cache, seed):
    """Requests join, leave, are retracted, and take each other's rows.

    What a step keeps is marked with the request and the position; what it uses again must be its
    own, of the step that chose last. And a request alone would have done the same.
    """
    chance = random.Random(seed)
    running: dict[int, list] = {}  # row -> [name, length, length of its last own choice]
    reused = 0
    for turn in range(400):
        for row in range(ROWS):
            if row not in running and chance.random() < 0.3:
                running[row] = [f"{turn}-{row}", chance.randint(200, 400), None]
            elif row in running and chance.random() < 0.05:
                del running[row]
        batch = [row for row in running if chance.random() < 0.9]
        chance.shuffle(batch)
        decodes, lengths = [], []
        for row in batch:
            request = running[row]
            more = 1 if chance.random() < 0.95 else chance.randint(1, 70)
            decodes.append(more == 1 and chance.random() < 0.98)
            request[1] += more
            lengths.append(request[1])
        names = [running[row][0] for row in batch]
        again = cache.step(batch, names, decodes, lengths, START)
        for row, decode, length, reuses in zip(batch, decodes, lengths, again, strict=True):
            request = running[row]
            if not decode or (length - 1) // 64 * 64 < START:
                assert decode or not reuses
                request[2] = None
                continue
            mark = hash((request[0], request[2])) if reuses else hash((request[0], length))
            if reuses:
                assert request[2] is not None
                assert length - request[2] < REFRESH
                assert int(cache.get(0, torch.tensor([row])).pages[0, 0, 0]) == mark % 10**9
                reused += 1
            else:
                request[2] = length
                choice = Choice(torch.tensor([[[mark % 10**9]]]), torch.zeros(1, 1, 1))
                cache.keep(0, torch.tensor([row]), choice)
    assert reused > 200
