"""The life of one replica, as a pure state machine: no clock, no Ray, no network.

``step`` takes what happened and returns the replica's next state and what is to be done about it.
``fleet.py`` does it, and tells what happened.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal


class State(StrEnum):
    """Where a replica is in its life."""

    PENDING = "PENDING"  # waits for its turn, or for free machines
    LOADING = "LOADING"  # ranks start and load the model
    WARMING = "WARMING"  # every rank is loaded, the server answers its first request
    SERVING = "SERVING"
    DRAINING = "DRAINING"  # takes no new requests, ends those that run
    FAILED = "FAILED"  # given up; the last error says why


@dataclass(frozen=True)
class Policy:
    """How long to wait, and how often to try again; seconds."""

    place_s: float
    startup_s: float
    drain_s: float
    restarts: int
    window_s: float
    backoff_s: float
    max_backoff_s: float

    def backoff(self, restarts: int) -> float:
        """The pause before this many restarts of late: none before the first."""
        if restarts <= 1:
            return 0.0
        # 2 ** 64 would be no float any more
        return min(self.max_backoff_s, self.backoff_s * 2.0 ** min(restarts - 2, 60))


@dataclass(frozen=True)
class Replica:
    """One replica. ``attempt`` counts how often it was placed."""

    state: State = State.PENDING
    attempt: int = 0
    since: float = 0.0  # when it came into this state
    not_before: float = 0.0  # when it may be placed again
    placing: bool = False  # a placement was asked for, and not answered
    ending: bool = False  # a teardown was asked for, and not answered
    restarts: tuple[float, ...] = ()  # when it was restarted of late, because something broke
    error: str = ""  # the last one
    then: Literal["remove", "restart"] = "remove"  # what follows once it is drained
    url: str = ""

    @property
    def ready(self) -> bool:
        """Whether clients are sent to it."""
        return self.state is State.SERVING


# what happened. an attempt's number says of which one: news of an earlier attempt is no news


@dataclass(frozen=True)
class Tick:
    """Time passed."""


@dataclass(frozen=True)
class Placed:
    """Its machines are set aside."""

    attempt: int


@dataclass(frozen=True)
class Loaded:
    """Every rank has loaded the model."""

    attempt: int


@dataclass(frozen=True)
class Ready:
    """Its server answered a first request."""

    attempt: int
    url: str


@dataclass(frozen=True)
class Broke:
    """A process died or hangs, a node is gone, it could not be placed: anything that ends it."""

    attempt: int
    error: str


@dataclass(frozen=True)
class Refused:
    """It can never run: another attempt would end the same way."""

    attempt: int
    error: str


@dataclass(frozen=True)
class Drain:
    """It shall end when its requests have."""

    then: Literal["remove", "restart"]


@dataclass(frozen=True)
class Idle:
    """No request runs on it any more."""

    attempt: int


@dataclass(frozen=True)
class Ended:
    """Nothing of an attempt is left."""

    attempt: int


Event = Tick | Placed | Loaded | Ready | Broke | Refused | Drain | Idle | Ended


# what is to be done


@dataclass(frozen=True)
class Place:
    """Set machines aside and start the attempt on them."""

    attempt: int


@dataclass(frozen=True)
class Admit:
    """Send clients to it."""

    url: str


@dataclass(frozen=True)
class Dismiss:
    """Send no client to it any more."""

    url: str


@dataclass(frozen=True)
class End:
    """End every process of the attempt, and give its machines back."""

    attempt: int


@dataclass(frozen=True)
class Forget:
    """It is drained and gone."""


Action = Place | Admit | Dismiss | End | Forget


def step(
    replica: Replica, event: Event, now: float, policy: Policy
) -> tuple[Replica, list[Action]]:
    """The replica after ``event`` at ``now`` (seconds of a steady clock), and what to do."""
    if replica.state is State.FAILED and not isinstance(event, Ended | Drain):
        return replica, []
    match event:
        case Tick():
            return _tick(replica, now, policy)
        case Drain(then):
            return _drain(replica, then, now)
        case Placed(attempt) | Loaded(attempt) | Ready(attempt) | Broke(attempt) | Refused(attempt):
            # an attempt that is being ended has nothing to say, either
            if attempt != replica.attempt or replica.ending or not _runs(replica):
                return replica, []
        case Idle(attempt) | Ended(attempt):
            if attempt != replica.attempt:
                return replica, []
    match event:
        case Placed():
            if replica.state is not State.PENDING:
                return replica, []
            return replace(replica, state=State.LOADING, since=now, placing=False), []
        case Loaded():
            if replica.state is not State.LOADING:
                return replica, []
            return replace(replica, state=State.WARMING), []
        case Ready(url=url):
            if replica.state not in (State.LOADING, State.WARMING):
                return replica, []
            return replace(replica, state=State.SERVING, since=now, url=url), [Admit(url)]
        case Broke(error=error):
            return _break(replica, error, now, policy)
        case Refused(error=error):
            return _give_up(replica, error, now)
        case Idle():
            if replica.state is not State.DRAINING or replica.ending:
                return replica, []
            return replace(replica, ending=True), [End(replica.attempt)]
        case Ended():
            return _ended(replica, now)
    raise AssertionError(event)


def _runs(replica: Replica) -> bool:
    """Whether there are processes, or a placement under way."""
    return replica.state is not State.PENDING or replica.placing


def _tick(replica: Replica, now: float, policy: Policy) -> tuple[Replica, list[Action]]:
    if replica.ending:
        return replica, []
    waited = now - replica.since
    if replica.state is State.PENDING and not replica.placing:
        if now < replica.not_before:
            return replica, []
        attempt = replica.attempt + 1
        return replace(replica, attempt=attempt, placing=True, since=now), [Place(attempt)]
    if replica.state is State.PENDING and waited > policy.place_s:
        return _break(replica, f"no free machines in {policy.place_s:g} s", now, policy)
    if replica.state in (State.LOADING, State.WARMING) and waited > policy.startup_s:
        return _break(replica, f"did not start in {policy.startup_s:g} s", now, policy)
    if replica.state is State.DRAINING and waited > policy.drain_s:
        return replace(replica, ending=True), [End(replica.attempt)]
    return replica, []


def _drain(replica: Replica, then: str, now: float) -> tuple[Replica, list[Action]]:
    wish: Literal["remove", "restart"] = "restart" if then == "restart" else "remove"
    if replica.state is State.FAILED:
        if wish == "restart":
            return replica, []
        # what is left of it to remove is only the memory of it
        removed = replace(replica, state=State.DRAINING, then=wish)
        return removed, [] if replica.ending else [Forget()]
    if replica.state is State.DRAINING:
        # to remove is the stronger wish
        return replace(replica, then="remove" if wish == "remove" else replica.then), []
    draining = replace(replica, state=State.DRAINING, since=now, then=wish)
    if replica.state is State.SERVING:
        return draining, [Dismiss(replica.url)]
    if replica.ending:
        return draining, []
    if not _runs(replica):
        # nothing was started, so nothing is to be ended
        return _ended(draining, now)
    return replace(draining, ending=True), [End(replica.attempt)]


def _break(
    replica: Replica, error: str, now: float, policy: Policy
) -> tuple[Replica, list[Action]]:
    if replica.state is State.DRAINING:
        return replace(replica, ending=True, error=error), [End(replica.attempt)]
    recent = tuple(at for at in replica.restarts if now - at < policy.window_s)
    if len(recent) >= policy.restarts:
        times = f"{len(recent)} restarts in {policy.window_s:g} s did not help"
        return _give_up(replica, f"{error} ({times})", now)
    recent = (*recent, now)
    pending = replace(
        replica,
        state=State.PENDING,
        since=now,
        not_before=now + policy.backoff(len(recent)),
        placing=False,
        ending=True,
        restarts=recent,
        error=error,
        url="",
    )
    return pending, [*_dismissed(replica), End(replica.attempt)]


def _give_up(replica: Replica, error: str, now: float) -> tuple[Replica, list[Action]]:
    if replica.state is State.DRAINING:
        return replace(replica, ending=True, error=error), [End(replica.attempt)]
    failed = replace(
        replica, state=State.FAILED, since=now, placing=False, ending=True, error=error, url=""
    )
    return failed, [*_dismissed(replica), End(replica.attempt)]


def _dismissed(replica: Replica) -> list[Action]:
    return [Dismiss(replica.url)] if replica.ready else []


def _ended(replica: Replica, now: float) -> tuple[Replica, list[Action]]:
    ended = replace(replica, ending=False, url="")
    if replica.state is not State.DRAINING:
        return ended, []
    if replica.then == "remove":
        return ended, [Forget()]
    return replace(ended, state=State.PENDING, since=now, not_before=now, placing=False), []
