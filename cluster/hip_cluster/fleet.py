"""Runs an endpoint's replicas: tells their state machines what happened, and does what they say."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import httpx

from hip_cluster.environment import carried
from hip_cluster.link import Member
from hip_cluster.links import LinkServer
from hip_cluster.metrics import Metrics
from hip_cluster.placement import placement
from hip_cluster.ray_cluster import Attempt, ClusterError, RayCluster
from hip_cluster.router import Router
from hip_cluster.spec import EndpointSpec
from hip_cluster.supervisor import (
    Action,
    Admit,
    Broke,
    Dismiss,
    Drain,
    End,
    Ended,
    Event,
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
from hip_cluster.timing import hang_seconds
from hip_sglang.secret import Secret

TICK_SECONDS = 0.1
# how long processes get to end after they were told to; then Ray's word has to do
END_SECONDS = 15.0
IDLE_LOOKS = 3
PLACE_SLACK_SECONDS = 30.0

log = logging.getLogger("hip_cluster")


class Fleet:
    """The replicas of one endpoint, on one event loop; Ray's calls in threads."""

    def __init__(
        self,
        spec: EndpointSpec,
        cluster: RayCluster,
        api_key: Secret | None,
        metrics: Metrics,
    ) -> None:
        limits = spec.limits
        self.spec = spec
        self.replicas: dict[int, Replica] = {}
        self.wanted = spec.replicas
        self.policy = Policy(
            # Ray's own word comes first, for it says what is missing
            place_s=2 * limits.place_s + PLACE_SLACK_SECONDS,
            startup_s=limits.startup_s,
            drain_s=limits.drain_s,
            restarts=limits.restarts,
            window_s=limits.window_s,
            backoff_s=limits.backoff_s,
            max_backoff_s=limits.max_backoff_s,
        )
        self.router: Router | None = None
        self.links = LinkServer(self._hear, api_key)
        self._cluster = cluster
        self._metrics = metrics
        self._run = secrets.token_hex(3)
        self._hang = hang_seconds(spec)
        # a router of ours is told, one that is not has to notice
        self._notice = spec.router.notice_s if spec.router.mode == "external" else 0.0
        self._attempts: dict[int, Attempt] = {}
        self._loaded: dict[int, set[int]] = {}
        self._idle_looks: dict[int, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._broken_at: dict[int, float] = {}
        self._link_address = ("", 0)
        self._stopping = False
        # a number is given once, so that nobody takes news of one replica for another's
        self._numbers = itertools.count()

    async def start(self) -> None:
        """Listen for ranks, and begin. Raises OSError where the port is taken."""
        port = await self.links.start(self._cluster.node, self.spec.supervisor.link_port)
        self._link_address = (self._cluster.node, port)
        self.scale(self.spec.replicas)

    async def run(self) -> None:
        """Until every replica was given up, or removed: raises ClusterError with the last error."""
        looked = 0.0
        while self.replicas:
            for index in list(self.replicas):
                self._tell(index, Tick())
                self._look_for_hangs(index)
            if time.monotonic() - looked > 1.0:
                looked = time.monotonic()
                await self._look_for_idle_ones()
                await self._look_for_stillborn_ones()
            states = [replica.state for replica in self.replicas.values()]
            if states and all(state is State.FAILED for state in states):
                errors = {replica.error for replica in self.replicas.values()}
                raise ClusterError("; ".join(sorted(errors)))
            await asyncio.sleep(TICK_SECONDS)

    async def stop(self) -> None:
        """End everything at once, and wait until it is gone."""
        self._stopping = self._cluster.closing = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*(self._end(i, self.replicas[i].attempt) for i in list(self.replicas)))
        await self.links.stop()

    def scale(self, count: int) -> None:
        """Have so many replicas; the newest go first."""
        self.wanted = count
        staying = [i for i, r in self.replicas.items() if not _leaves(r)]
        for index in sorted(staying)[count:]:
            self._tell(index, Drain("remove"))
        for _ in range(count - len(staying)):
            index = next(self._numbers)
            self.replicas[index] = Replica(since=time.monotonic())
            self._tell(index, Tick())

    async def restart(self) -> None:
        """Replace one replica after another; behind a router two of them go unnoticed."""
        for index in sorted(self.replicas):
            if index not in self.replicas or _leaves(self.replicas[index]):
                continue
            before = self.replicas[index].attempt
            self._tell(index, Drain("restart"))
            while (now := self.replicas.get(index)) and now.state is not State.FAILED:
                if now.attempt > before and now.ready and self.has_clients(now):
                    break
                await asyncio.sleep(TICK_SECONDS)

    def has_clients(self, replica: Replica) -> bool:
        """Whether the router, where there is one, sends clients to it by now."""
        return self.router is None or replica.url in self.router.admitted

    def drain(self) -> None:
        """Let every request end, then remove every replica."""
        self.wanted = 0
        for index in list(self.replicas):
            self._tell(index, Drain("remove"))

    # what happens

    def _hear(self, member: Member, message: Mapping[str, Any]) -> None:
        """A wire said something, or ended."""
        index, attempt = member.replica, member.attempt
        if index not in self.replicas or attempt != self.replicas[index].attempt:
            return
        match message["kind"]:
            case "loaded":
                loaded = self._loaded.setdefault(index, set())
                loaded.add(member.rank)
                if len(loaded) == self.spec.parallel.ranks:
                    self._tell(index, Loaded(attempt))
            case "ready":
                self._tell(index, Ready(attempt, str(message["url"])))
            case "failed":
                # an actor whose method raised is still there
                starting = not self.replicas[index].ready
                kind = Refused if message["final"] and starting else Broke
                self._tell(index, kind(attempt, str(message["problem"])))
            case "left":
                self._tell(index, Broke(attempt, f"{member.name} died"))

    def _look_for_hangs(self, index: int) -> None:
        replica, now = self.replicas.get(index), time.monotonic()
        if replica is None or replica.state not in (State.SERVING, State.DRAINING):
            return
        for member in self.links.members(index, replica.attempt):
            wire = self.links.wires[member]
            if now - wire.heard > self.spec.limits.silence_s:
                silent = f"{member.name} hangs: silent for {now - wire.heard:.1f} s"
                self._tell(index, Broke(replica.attempt, silent))
            elif now - wire.moved > self._hang:
                stuck = f"{member.name} hangs: work and no step for {now - wire.moved:.1f} s"
                self._tell(index, Broke(replica.attempt, stuck))

    async def _look_for_stillborn_ones(self) -> None:
        """Whoever ended before it had a wire: only Ray knows why."""
        for index, replica in list(self.replicas.items()):
            started = self._attempts.get(index)
            met = self.links.members(index, replica.attempt)
            if replica.state is State.LOADING and started is not None and not met:
                problem = await asyncio.to_thread(self._cluster.end_of, started)
                if problem is not None and not self.links.members(index, replica.attempt):
                    self._tell(index, Broke(replica.attempt, problem))

    async def _look_for_idle_ones(self) -> None:
        draining = [i for i, r in self.replicas.items() if r.state is State.DRAINING]
        if not draining:
            return
        loads: Mapping[str, int] = {}
        if self.router is not None:
            try:
                loads = await self.router.loads()
            except httpx.HTTPError:
                # it is being restarted: nobody can say yet
                return
        for index in draining:
            replica = self.replicas.get(index)
            if replica is None:
                continue
            wires = [self.links.wires[m] for m in self.links.members(index, replica.attempt)]
            if time.monotonic() - replica.since < self._notice:
                continue
            busy = loads.get(replica.url, 0) > 0 or any(wire.progress.busy for wire in wires)
            self._idle_looks[index] = 0 if busy else self._idle_looks.get(index, 0) + 1
            # a request may be on its way from the server to the ranks
            if self._idle_looks[index] >= IDLE_LOOKS:
                self._tell(index, Idle(replica.attempt))

    # what is to be done

    def _tell(self, index: int, event: Event) -> None:
        if self._stopping or index not in self.replicas:
            return
        before = self.replicas[index]
        after, actions = step(before, event, time.monotonic(), self.policy)
        self.replicas[index] = after
        if after.state is not before.state:
            log.info("replica %d: %s -> %s %s", index, before.state, after.state, after.error)
            self._account(index, before, after)
        for action in actions:
            self._do(index, action)
        self._metrics.observe(self.replicas.values())

    def _account(self, index: int, before: Replica, after: Replica) -> None:
        now = time.monotonic()
        if len(after.restarts) and after.restarts[-1:] != before.restarts[-1:]:
            self._metrics.restarts.inc()
            self._broken_at[index] = now
        if after.ready and index in self._broken_at:
            self._metrics.recovery.observe(now - self._broken_at.pop(index))

    def _do(self, index: int, action: Action) -> None:
        match action:
            case Place(attempt):
                self._loaded.pop(index, None)
                self._spawn(self._place(index, attempt))
            case Admit(url):
                self._spawn(self._with_router(lambda router: router.admit(url)))
            case Dismiss(url):
                self._idle_looks[index] = 0
                if self.router is not None:
                    self._spawn(self._with_router(lambda router: router.dismiss(url)))
                elif self.replicas[index].state is State.DRAINING:
                    self.links.tell(index, self.replicas[index].attempt, {"kind": "drain"})
            case End(attempt):
                self._spawn(self._end(index, attempt))
            case Forget():
                self.replicas.pop(index, None)
                log.info("replica %d: removed", index)

    async def _place(self, index: int, attempt: int) -> None:
        name = f"{self.spec.name}:{index}:{attempt}:{self._run}"
        asked, seconds = placement(self.spec), self.spec.limits.place_s
        placed = None
        try:
            if problem := await self._wait_for_machines(index, attempt):
                # nobody joins a cluster of our own
                kind = Refused if self._cluster.own else Broke
                return self._tell(index, kind(attempt, problem))
            placed = await asyncio.to_thread(self._cluster.place, asked, name, seconds)
            if self._is_over(index, attempt):
                return await asyncio.to_thread(self._cluster.give_back, placed)
            started = await asyncio.to_thread(
                self._cluster.start, self._group(index, attempt), placed, f"{name}:engine"
            )
        except Exception as error:
            # whatever Ray raises: the attempt is over, and said to be
            if placed is not None:
                await asyncio.to_thread(self._cluster.give_back, placed)
            return self._tell(index, Broke(attempt, str(error)))
        if self._is_over(index, attempt):
            return await asyncio.to_thread(self._cluster.end, started)
        self._attempts[index] = started
        self._tell(index, Placed(attempt))

    async def _wait_for_machines(self, index: int, attempt: int) -> str | None:
        """What the cluster has too little of even where it is empty; None as soon as it has not."""
        deadline, told = time.monotonic() + self.spec.limits.place_s, False
        while problem := await asyncio.to_thread(self._cluster.missing, self.spec):
            late = time.monotonic() > deadline
            if self._cluster.own or late or self._is_over(index, attempt):
                return problem
            if not told:
                log.warning("replica %d: %s; waiting for machines", index, problem)
                told = True
            await asyncio.sleep(1.0)
        return None

    def _is_over(self, index: int, attempt: int) -> bool:
        replica = self.replicas.get(index)
        return replica is None or replica.attempt != attempt or not replica.placing

    def _group(self, index: int, attempt: int) -> Any:
        from hip_cluster.engine import Group

        managed = self.spec.router.mode == "managed"
        return Group(
            spec=self.spec,
            member=Member(self.spec.name, index, attempt, "engine", 0, self.links.secret),
            supervisor=self._link_address,
            environment=carried(),
            # the router may stand on another machine
            host=None if managed else self.spec.server.host,
            port=0 if managed else self.spec.server.port,
        )

    async def _end(self, index: int, attempt: int) -> None:
        """Nobody of the attempt is left afterwards."""
        self.links.dismiss(index, attempt)
        started = self._attempts.pop(index, None)
        if started is not None:
            try:
                await asyncio.to_thread(self._cluster.end, started)
            except Exception as error:
                # Ray itself may be gone; the wires say whether the processes are
                log.warning("replica %d: Ray did not end it: %s", index, error)
        deadline = time.monotonic() + END_SECONDS
        while self.links.members(index, attempt) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if index in self.replicas:
            self._tell(index, Ended(attempt))

    async def _with_router(self, do: Callable[[Router], Awaitable[None]]) -> None:
        if self.router is None:
            return
        try:
            await do(self.router)
        except httpx.HTTPError as error:
            # one that was just started again is told of everybody
            log.warning("the router did not listen: %s", error)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _leaves(replica: Replica) -> bool:
    return replica.state is State.DRAINING and replica.then == "remove"
