"""A replica's life, without Ray: whatever happens in whatever order."""

from dataclasses import replace

import pytest
from hip_cluster.supervisor import (
    Admit,
    Broke,
    Dismiss,
    Drain,
    End,
    Ended,
    Forget,
    Idle,
    Loaded,
    Place,
    Placed,
    Policy,
    Ready,
    Refused,
    Replica,
    State,
    Tick,
    step,
)
from hypothesis import given, settings
from hypothesis import strategies as st

POLICY = Policy(
    place_s=30,
    startup_s=100,
    drain_s=50,
    restarts=3,
    window_s=1000,
    backoff_s=2,
    max_backoff_s=7,
)


class Life:
    """A replica, a clock, and everything that it asked for."""

    def __init__(self, policy=POLICY):
        self.replica, self.now, self.policy, self.actions = Replica(), 0.0, policy, []

    def __call__(self, event, after=0.0):
        self.now += after
        self.replica, actions = step(self.replica, event, self.now, self.policy)
        self.actions += actions
        return actions

    def serve(self):
        self(Tick())
        for event in (Placed, Loaded):
            self(event(self.replica.attempt))
        return self(Ready(self.replica.attempt, "http://a"))


def test_a_replica_is_placed_loads_warms_up_and_serves():
    life = Life()
    assert life(Tick()) == [Place(1)]
    assert life.replica.state is State.PENDING
    assert life(Placed(1)) == []
    assert life.replica.state is State.LOADING
    assert life(Loaded(1)) == []
    assert life.replica.state is State.WARMING
    assert life(Ready(1, "http://a")) == [Admit("http://a")]
    assert life.replica.state is State.SERVING


def test_clients_are_sent_away_before_a_dead_group_is_ended():
    life = Life()
    life.serve()
    assert life(Broke(1, "rank 1 died")) == [Dismiss("http://a"), End(1)]
    assert not life.replica.ready
    assert life.replica.error == "rank 1 died"


def test_it_is_not_placed_again_while_something_of_it_is_left():
    life = Life()
    life.serve()
    life(Broke(1, "rank 1 died"))
    assert life(Tick(), after=100) == []
    life(Ended(1))
    assert life(Tick()) == [Place(2)]


def test_the_first_restart_is_at_once_and_the_next_ones_wait_longer_and_longer():
    life = Life(replace(POLICY, restarts=9))
    pauses = []
    for attempt in range(1, 7):
        life.serve()
        life(Broke(attempt, "x"))
        life(Ended(attempt))
        pauses.append(life.replica.not_before - life.now)
        life.now = life.replica.not_before
    assert pauses == [0, 2, 4, 7, 7, 7]


def test_a_crash_loop_ends_with_the_last_error():
    life = Life()
    for attempt in range(1, 5):
        life.now = max(life.now, life.replica.not_before)
        life.serve()
        life(Broke(attempt, f"error {attempt}"))
        life(Ended(attempt))
    assert life.replica.state is State.FAILED
    assert life.replica.error == "error 4 (3 restarts in 1000 s did not help)"
    assert life(Tick(), after=1e6) == []


def test_restarts_of_long_ago_do_not_count():
    life = Life()
    for attempt in range(1, 20):
        life.now += POLICY.window_s
        life.serve()
        life(Broke(attempt, "x"))
        life(Ended(attempt))
        assert life.replica.state is State.PENDING


@pytest.mark.parametrize(
    ("steps", "wait", "error"),
    [
        (0, POLICY.place_s, "no free machines in 30 s"),
        (1, POLICY.startup_s, "did not start in 100 s"),
        (2, POLICY.startup_s, "did not start in 100 s"),
    ],
)
def test_what_takes_too_long_is_ended_and_tried_again(steps, wait, error):
    life = Life()
    life(Tick())
    for event in (Placed(1), Loaded(1))[:steps]:
        life(event)
    assert life(Tick(), after=wait) == []
    assert life(Tick(), after=0.1) == [End(1)]
    assert life.replica.error == error


def test_warming_up_counts_towards_the_time_to_start():
    life = Life()
    life(Tick())
    life(Placed(1))
    life(Loaded(1), after=60)
    assert life(Tick(), after=41) == [End(1)]


def test_what_can_never_run_is_not_tried_again():
    life = Life()
    life(Tick())
    assert life(Refused(1, "model.path=/x does not exist")) == [End(1)]
    life(Ended(1))
    assert life.replica.state is State.FAILED
    assert life(Tick(), after=1e6) == []


def test_a_draining_replica_ends_when_its_requests_have():
    life = Life()
    life.serve()
    assert life(Drain("remove")) == [Dismiss("http://a")]
    assert life.replica.state is State.DRAINING
    assert life(Tick(), after=10) == []
    assert life(Idle(1)) == [End(1)]
    assert life(Ended(1)) == [Forget()]


def test_a_draining_replica_does_not_wait_for_ever():
    life = Life()
    life.serve()
    life(Drain("remove"))
    assert life(Tick(), after=POLICY.drain_s + 1) == [End(1)]


def test_a_drained_replica_comes_back_where_it_shall_and_that_is_no_failure():
    life = Life()
    life.serve()
    life(Drain("restart"))
    life(Idle(1))
    assert life(Ended(1)) == []
    assert life(Tick()) == [Place(2)]
    assert life.replica.restarts == ()


def test_a_replica_that_dies_while_it_drains_is_removed_all_the_same():
    life = Life()
    life.serve()
    life(Drain("remove"))
    assert life(Broke(1, "rank 0 died")) == [End(1)]
    assert life(Ended(1)) == [Forget()]


def test_one_that_waits_is_removed_at_once():
    assert Life()(Drain("remove")) == [Forget()]


# everything else: any events in any order


KINDS = (
    lambda attempt: Tick(),
    Placed,
    Loaded,
    lambda attempt: Ready(attempt, "http://a"),
    lambda attempt: Broke(attempt, "it broke"),
    lambda attempt: Refused(attempt, "it cannot"),
    lambda attempt: Drain("remove"),
    lambda attempt: Drain("restart"),
    Idle,
    Ended,
)
# what happens, to this attempt or to one beside it, and how long after
NEWS = st.tuples(
    st.sampled_from(KINDS),
    st.sampled_from([0, 0, 0, 0, -1, 1]),
    st.sampled_from([0.0, 0.5, 3.0, 40.0, 200.0, 2000.0]),
)
HISTORIES = st.lists(NEWS, max_size=40)
MANY = settings(max_examples=800, deadline=None)


class Watched(Life):
    """Checks at every step what must hold whatever happens."""

    def __init__(self):
        super().__init__()
        self.admitted = self.forgotten = False
        self.alive = set()  # attempts that were placed and not ended
        self.asked_to_end = set()

    def __call__(self, event, after=0.0):
        before = self.replica
        if isinstance(event, Ended):
            # only what was asked to end can have ended
            if event.attempt not in self.asked_to_end:
                return []
            self.alive.discard(event.attempt)
        actions = super().__call__(event, after)
        for action in actions:
            match action:
                case Place(attempt):
                    assert not self.alive, "two attempts at once"
                    assert attempt == before.attempt + 1
                    self.alive.add(attempt)
                case End(attempt):
                    assert attempt in self.alive, "ended what does not run"
                    assert attempt not in self.asked_to_end, "ended twice"
                    self.asked_to_end.add(attempt)
                case Admit():
                    assert not self.admitted
                    self.admitted = True
                case Dismiss():
                    assert self.admitted
                    self.admitted = False
                case Forget():
                    assert not self.alive, "forgot what still runs"
                    self.forgotten = True
        assert self.admitted == self.replica.ready
        assert len(self.replica.restarts) <= self.policy.restarts
        kinds = [type(action) for action in actions]
        if Dismiss in kinds and End in kinds:
            assert kinds.index(Dismiss) < kinds.index(End), "readiness flips first"
        if before.state is State.FAILED:
            assert not {Place, Admit} & set(kinds)
        return actions


def after(history):
    """A replica to which all of this happened, or None where it was forgotten meanwhile."""
    life = Watched()
    for kind, offset, pause in history:
        life(kind(life.replica.attempt + offset), pause)
        if life.forgotten:
            return None
    return life


@MANY
@given(HISTORIES)
def test_whatever_happens_nothing_is_lost_or_started_twice(history):
    after(history)


@MANY
@given(HISTORIES)
def test_from_wherever_it_is_a_replica_comes_to_serve_or_gives_up(history):
    """Where machines are there and nothing breaks any more."""
    life = after(history)
    for _ in range(12 if life else 0):
        attempt = life.replica.attempt
        for event in (Idle(attempt), Ended(attempt), Tick(), Tick()):
            life(event, 10.0)
            if life.forgotten:
                return
        attempt = life.replica.attempt
        for event in (Placed(attempt), Loaded(attempt), Ready(attempt, "http://a")):
            life(event)
    assert life is None or life.replica.state in (State.SERVING, State.FAILED)


@MANY
@given(HISTORIES)
def test_a_replica_that_shall_go_always_goes(history):
    life = after(history)
    if life is None:
        return
    life(Drain("remove"))
    for event in (Tick(), Ended(life.replica.attempt)):
        if not life.forgotten:
            life(event, POLICY.drain_s + 1)
    assert life.forgotten


@MANY
@given(HISTORIES, st.sampled_from([-1, 1]), st.sampled_from([1, 2, 3, 4, 5, 8, 9]))
def test_news_of_another_attempt_change_nothing(history, offset, kind):
    life = after(history)
    if life is None:
        return
    late = KINDS[kind](life.replica.attempt + offset)
    assert step(life.replica, late, life.now, POLICY) == (life.replica, [])
