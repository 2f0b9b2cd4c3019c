"""Decode steps of every kind in the same launches, each in a row of its own."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from hip_kernels.attend import fused
from hip_kernels.layout import PAGE_SIZE, Choice, SparsePlan
from hip_kernels.steps import NO_PAGE, DecodeSteps

from tests.kernels import door
from tests.kernels.brute import expected
from tests.kernels.test_attend import queries

PLAN = SparsePlan(1, 3, 2, "harmonic", 1, beam=2)
LIMITS = {"sparse_from": None, "sparse_decode_from": 512, "nodes_from": 1500}
# padding, dense, sparse, held, through nodes, held and through nodes
LENGTHS = (1, 300, 900, 1100, 2900, 2047)
REUSES = (0, 1, 0, 1, 0, 1)
ROWS = (5, 0, 3, 1, 6, 2)


def test_each_step_is_as_it_would_be_alone(
    interpreted: Callable[[ModuleType], ModuleType],
) -> None:
    shapes = [(length - 1, 1) for length in LENGTHS]
    requests = door.make_requests(shapes, heads=2, width=24, value_width=40)
    query = queries(requests, 6, 24)
    _, earlier = door.step(requests, queries(requests, 6, 24, seed=2), PLAN, **LIMITS)
    here = door.scatter(requests)
    nodes, node_table = door.with_nodes(here, requests, 0)
    kept = Choice.empty(7, 2, 3, PLAN, "cpu")
    kept.entries.fill_(-7)
    kept.correction.fill_(7)
    row, held = torch.tensor(ROWS), torch.tensor(REUSES).bool()
    kept.entries[row[held]] = earlier.entries[held]
    kept.correction[row[held]] = earlier.correction[held]
    before = kept.entries.clone()
    position = torch.tensor(LENGTHS) - 1
    steps = DecodeSteps(
        token=torch.arange(len(LENGTHS)),
        position=position,
        page=position // PAGE_SIZE,
        table=here.page_table,
        row=row,
        reuses=held.int(),
        nodes=node_table,
        sparse_from=512 // PAGE_SIZE,
        nodes_from=-(-1500 // PAGE_SIZE),
    )
    given = query, here.kv, here.summaries, steps, kept, PLAN, 24**-0.5
    out = torch.full((len(LENGTHS), 6, 40), float("nan"))

    interpreted(fused)
    estimated = torch.full((len(LENGTHS), 6), float("nan"))
    fused.attend_steps(*given, out, estimated, nodes)

    for n, request in enumerate(requests):
        own = slice(n, n + 1)
        again = Choice(earlier.entries[own], earlier.correction[own]) if held[n] else None
        alone = expected([request], query[own], PLAN, **LIMITS, held=again)
        torch.testing.assert_close(out[own].double(), alone, rtol=1e-4, atol=1e-5)
    sparse = position >= 512
    assert (estimated[sparse] > 0).all()
    assert not estimated[~sparse].any()
    # a choice stands where it belongs, and nothing else was touched
    fresh = sparse & ~held
    assert (kept.entries[row[fresh]] >= 0).any(-1).all()
    others = torch.ones(7, dtype=torch.bool)
    others[row[fresh]] = False
    assert torch.equal(kept.entries[others], before[others])

    # a layer that never prunes weighs nothing
    dense = DecodeSteps(**{**vars(steps), "sparse_from": NO_PAGE})
    fused.attend_steps(*given[:3], dense, *given[4:], out, estimated, nodes)
    everything = {"sparse_from": None, "sparse_decode_from": None}
    torch.testing.assert_close(
        out.double(), expected(requests, query, PLAN, **everything), rtol=1e-4, atol=1e-5
    )
    assert not estimated.any()
