"""Nodes are found where they are, made again when their pages change, and never stale."""

import random

import pytest
import torch
from hip_kernels.layout import NODE_PAGES, PAGE_SIZE

from hip_sglang.attention.decode_plan import NodeTables
from hip_sglang.attention.plan import NodePlan, completed_pages
from hip_sglang.kv.node_directory import NodeDirectory

POOL, REQUESTS = 200, 6
START = 16 * PAGE_SIZE


class Scheduler:
    """What SGLang does with pages, by script: requests share prefixes, grow, end and are evicted.

    ``content`` numbers what each page holds, ``nodes`` what each place was made of.
    """

    def __init__(self, seed: int, *, by_tables: bool) -> None:
        self.random = random.Random(seed)
        self.directory = NodeDirectory(POOL, REQUESTS, "cpu")
        self.tables: NodeTables | None = None
        if by_tables:
            self.tables = NodeTables(self.directory, START, REQUESTS, POOL, self.make)
            self.updates = 0
        self.free = list(range(POOL))
        self.random.shuffle(self.free)
        self.running: list[tuple[list[int], int]] = []  # pages, tokens
        self.cached: list[list[int]] = []  # prefixes of whole pages, in the radix cache
        self.content = [0] * POOL
        self.writes = 0
        self.nodes: dict[int, list[int]] = {}
        self.made = 0

    def step(self) -> None:
        """One forward pass over all running requests, a new one among them, perhaps."""
        while len(self.free) < REQUESTS + 40:
            self.evict()
        prefixes = [tokens for _, tokens in self.running]
        self.running = [self.grown(pages, tokens, 1) for pages, tokens in self.running]
        if len(self.running) < REQUESTS and self.random.random() < 0.3:
            shared = self.random.choice(self.cached or [[]])
            pages = shared[: self.random.randint(0, len(shared))]
            prefixes.append(len(pages) * PAGE_SIZE)
            self.running.append(
                self.grown(pages, prefixes[-1], self.random.randint(1, 40 * PAGE_SIZE))
            )
        self.check(prefixes)
        if self.running and self.random.random() < 0.25:
            pages, tokens = self.running.pop(self.random.randrange(len(self.running)))
            self.cached.append(pages[: tokens // PAGE_SIZE])

    def grown(self, pages: list[int], tokens: int, more: int) -> tuple[list[int], int]:
        wanted = -(-(tokens + more) // PAGE_SIZE)
        pages = pages + [self.free.pop() for _ in range(wanted - len(pages))]
        for page in pages[tokens // PAGE_SIZE :]:
            self.writes += 1
            self.content[page] = self.writes
        return pages, tokens + more

    def evict(self) -> None:
        """The last page of a cached prefix that nobody else holds, or a whole running request."""
        running = {page for pages, _ in self.running for page in pages}
        for prefix in self.cached:
            others = {page for other in self.cached if other is not prefix for page in other}
            if not prefix or prefix[-1] in running:
                continue
            page = prefix.pop()
            if page not in others:
                self.free.append(page)
            return
        pages, _ = self.running.pop(0)
        kept = {page for other, _ in self.running for page in other}
        kept |= {page for other in self.cached for page in other}
        self.free += [page for page in pages if page not in kept]

    def check(self, prefixes: list[int]) -> None:
        lengths = [tokens for _, tokens in self.running]
        table = torch.zeros(len(lengths), max(map(len, (p for p, _ in self.running)), default=0))
        table = table.long()
        for row, (pages, _) in enumerate(self.running):
            table[row, : len(pages)] = torch.tensor(pages)
        completed = completed_pages(prefixes, lengths, table)
        if self.tables and all(
            n == before + 1 for n, before in zip(lengths, prefixes, strict=True)
        ):
            found = self.of_decodes(lengths, table)
            # in a graph a request that completes no page names none
            completed = torch.cat([completed, torch.tensor([-1])])
            self.directory.forget(completed)
        else:
            self.directory.forget(completed)
            plan = NodePlan.of(self.directory, START, lengths, table)
            if self.tables:
                self.tables.forget()
            if plan is None:
                return
            self.make(plan)
            found = plan.table
        for row, (pages, tokens) in enumerate(self.running):
            count = (tokens - 1) // PAGE_SIZE // NODE_PAGES
            if (tokens - 1) // PAGE_SIZE * PAGE_SIZE < START:
                continue
            for node in range(count):
                children = pages[node * NODE_PAGES : (node + 1) * NODE_PAGES]
                held = self.nodes[int(found[row, node])]
                assert held == [self.content[page] for page in children]

    def make(self, plan: NodePlan) -> None:
        for place, pages in zip(plan.new_places.tolist(), plan.new_pages.tolist(), strict=True):
            self.nodes[place] = [self.content[page] for page in pages]
            self.made += 1

    def of_decodes(self, lengths: list[int], table: torch.Tensor) -> torch.Tensor:
        assert self.tables is not None
        slots = torch.zeros(len(table), POOL * PAGE_SIZE, dtype=torch.int32)
        slots[:, : table.shape[1] * PAGE_SIZE : PAGE_SIZE] = table * PAGE_SIZE
        self.tables.update(lengths, torch.arange(len(table)), slots)
        return self.tables.of(len(table))


@pytest.mark.parametrize("by_tables", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_a_node_is_always_that_of_its_pages(seed: int, by_tables: bool) -> None:
    scheduler = Scheduler(seed, by_tables=by_tables)
    for _ in range(400):
        scheduler.step()
    assert scheduler.made > 20


def test_a_pass_in_which_nothing_changed_looks_for_no_node() -> None:
    directory = NodeDirectory(64, 2, "cpu")
    made: list[NodePlan] = []
    tables = NodeTables(directory, 0, 2, 64, made.append)
    slots = torch.arange(64 * PAGE_SIZE)[None].int()
    row = torch.tensor([0])
    start = 2 * NODE_PAGES * PAGE_SIZE - 1
    for length in range(start, start + 4):
        tables.update([length], row, slots)
    # at first, and when the second node was full
    assert [len(plan.new_places) for plan in made] == [1, 1]
    tables.forget()
    tables.update([start + 4], row, slots)
    assert [len(plan.new_places) for plan in made] == [1, 1, 0]


def test_batches_that_take_turns_look_each_time() -> None:
    made: list[NodePlan] = []
    tables = NodeTables(NodeDirectory(64, 2, "cpu"), 0, 2, 64, made.append, in_turn=True)
    slots = torch.arange(128 * PAGE_SIZE).view(2, -1).int() % (64 * PAGE_SIZE)
    for length, row in ((1100, 0), (1100, 1), (1101, 0)):
        tables.update([length], torch.tensor([row]), slots)
    assert len(made) == 3


def test_a_second_step_makes_nothing_anew() -> None:
    directory = NodeDirectory(64, 2, "cpu")
    table = torch.randperm(64)[None]
    length = 40 * PAGE_SIZE + 5
    first = NodePlan.of(directory, 0, [length], table)
    second = NodePlan.of(directory, 0, [length + 1], table)
    assert first is not None
    assert second is not None
    assert len(first.new_places) == 5
    assert len(second.new_places) == 0
    assert torch.equal(first.table, second.table)


def test_a_page_that_is_written_anew_takes_its_node_with_it() -> None:
    directory = NodeDirectory(64, 2, "cpu")
    table = torch.arange(64)[None]
    length = 40 * PAGE_SIZE + 5
    assert NodePlan.of(directory, 0, [length], table) is not None
    directory.forget(torch.tensor([15, 20]))
    plan = NodePlan.of(directory, 0, [length], table)
    assert plan is not None
    assert plan.new_pages.tolist() == [list(range(8, 16))]


def test_short_requests_have_no_nodes() -> None:
    directory = NodeDirectory(64, 2, "cpu")
    table = torch.arange(64).view(2, 32)
    assert NodePlan.of(directory, 2048, [2048, 100], table) is None
    plan = NodePlan.of(directory, 2048, [2049, 2048], table)
    assert plan is not None
    assert plan.new_pages[:, -1].tolist() == [7, 15, 23, 31]


def test_what_a_step_needs_is_not_evicted_for_it() -> None:
    directory = NodeDirectory(16, 1, "cpu")
    for end in (7, 15, 3):
        directory.find(torch.tensor([end]))
    places, new = directory.find(torch.tensor([7, 11]))
    assert new.tolist() == [False, True]
    assert places[0] != places[1]
    assert directory.find(torch.tensor([15]))[1].tolist() == [True], "it made room"
