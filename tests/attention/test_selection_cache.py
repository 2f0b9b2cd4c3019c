"""A choice is used again by the steps after it and by nothing else: a stale one is wrong."""

import random

import pytest
import torch
from hip_kernels.layout import Choice

from hip_sglang.attention.selection_cache import SelectionCache, reused

REFRESH, START, ROWS = 4, 256, 5


@pytest.fixture
def cache():
    return SelectionCache(ROWS, {0: 8, 3: 8, 4: 5})


def once(cache, length, row=0, decode=True):
    """A pass of one request: whether it uses again what was chosen."""
    return bool(again(cache, torch.tensor([row]), torch.tensor([decode]), torch.tensor([length])))


def again(cache, rows, decodes, lengths):
    return reused(cache.step(rows, decodes, lengths, START), lengths, REFRESH)


def steps(cache, lengths, row=0):
    """Decode steps of one request."""
    return [once(cache, length, row) for length in lengths]


def test_it_chooses_first_and_then_by_length_alone(cache):
    assert steps(cache, range(1001, 1011)) == [False, True, True, False] + [True] * 3 + [
        False,
        True,
        True,
    ]


def test_a_step_that_is_not_sparse_leaves_nothing(cache):
    # the page from 256 on is the first that is sparse: its first step has nothing to use again
    assert steps(cache, range(254, 262)) == [False] * 4 + [True, True, False, True]


def test_another_owner_of_the_row_chooses_anew(cache):
    steps(cache, [1001])
    # its prompt, or the last token of one that was cached but for it
    for prompt in (1001, 1002):
        assert not once(cache, prompt, decode=False)
        assert steps(cache, [prompt + 1, prompt + 2]) == [False, (prompt + 2) % REFRESH != 0]


def test_a_gap_chooses_anew(cache):
    steps(cache, [1001])
    assert steps(cache, [1003]) == [False]


def test_rows_do_not_know_of_each_other(cache):
    steps(cache, [1001], row=0)
    assert steps(cache, [1002], row=1) == [False]
    assert steps(cache, [1002], row=0) == [True]


def test_padding_changes_no_row(cache):
    steps(cache, [1001])
    rows, lengths = torch.tensor([0, 0, 0]), torch.tensor([1002, 1, 1])
    assert bool(again(cache, rows, torch.ones(3).bool(), lengths)[0])
    assert steps(cache, [1003]) == [True]


def test_what_is_kept_is_found_by_row_and_layer(cache):
    cache.keep(3, torch.tensor([4, 1]), Choice(torch.tensor([[[5]], [[7]]]), torch.ones(2, 1, 2)))
    cache.keep(4, torch.tensor([4]), Choice(torch.tensor([[[9]]]), torch.zeros(1, 1, 2)))
    found = cache.get(3, torch.tensor([1, 4]))
    assert found.entries.tolist() == [[[7] + [-1] * 7], [[5] + [-1] * 7]]
    assert found.correction.tolist() == [[[1.0, 1.0]], [[1.0, 1.0]]]
    # a layer with a budget of its own
    assert cache.get(4, torch.tensor([4])).entries.tolist() == [[[9] + [-1] * 4]]


@pytest.mark.parametrize("seed", range(5))
def test_no_schedule_makes_it_stale(cache, seed):
    """Requests join, leave, are retracted, and take each other's rows.

    What a step keeps is marked with the request and the position; what it uses again must be its
    own, of the step that chose last. And a request alone would have done the same.
    """
    chance = random.Random(seed)
    running: dict[int, list] = {}  # row -> [name, length, length of its last own choice]
    new: set[int] = set()  # what has not been a prompt yet
    reused = 0
    for turn in range(400):
        for row in range(ROWS):
            if row not in running and chance.random() < 0.3:
                running[row] = [f"{turn}-{row}", chance.randint(200, 400), None]
                new.add(row)
            elif row in running and chance.random() < 0.05:
                del running[row]
        batch = [row for row in running if chance.random() < 0.9]
        chance.shuffle(batch)
        decodes, lengths = [], []
        for row in batch:
            request = running[row]
            more = 1 if chance.random() < 0.95 else chance.randint(1, 70)
            decodes.append(more == 1 and chance.random() < 0.98 and row not in new)
            new.discard(row)
            request[1] += more
            lengths.append(request[1])
        given = (
            torch.tensor(batch).long(),
            torch.tensor(decodes).bool(),
            torch.tensor(lengths).long(),
        )
        for row, decode, length, reuses in zip(
            batch, decodes, lengths, again(cache, *given), strict=True
        ):
            request = running[row]
            if not decode or (length - 1) // 64 * 64 < START:
                assert decode or not reuses
                request[2] = None
                continue
            mark = hash((request[0], request[2])) if reuses else hash((request[0], length))
            if reuses:
                assert request[2] is not None
                assert length - request[2] < REFRESH
                assert int(cache.get(0, torch.tensor([row])).entries[0, 0, 0]) == mark % 10**9
                reused += 1
            else:
                request[2] = length
                choice = Choice(torch.tensor([[[mark % 10**9]]]), torch.zeros(1, 1, 1))
                cache.keep(0, torch.tensor([row]), choice)
    assert reused > 200
