"""Clients of every sort at once: some ask, some leave, some are wrong; every answer is checked.

A round has its own prompts. Each is asked alone first, and what came then is what must come from
the crowd. A conversation that goes on has two answers: what its pages hold was computed by decode
steps, or, where it came first, as a prompt.
"""

from __future__ import annotations

import json
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

import httpx

from tests.server.test_hostile import BAD_REQUESTS, flush, hang_up, post
from tests.servers import Server
from tests.tiny_llama import VOCABULARY

LONGEST = 6000
NEW = 16
# log-probabilities: other shapes add in another order
TOLERANCE = 2e-4
# two tokens that are as good: rounding decides, and what follows differs
NEAR = 2e-3
# two pages that are as good: the other is attended in its place, until the next choice
NEAR_TIE = 2e-2


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, their log-probabilities, and how far behind the second best was."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    leads: tuple[float, ...]

    @classmethod
    def of(cls, meta: dict[str, Any]) -> Answer:
        chosen = meta["output_token_logprobs"]
        return cls(
            tokens=tuple(token for _, token, _ in chosen),
            logprobs=tuple(value for value, _, _ in chosen),
            leads=tuple(best[0][0] - best[1][0] for best in meta["output_top_logprobs"]),
        )


Alone = tuple[Answer, ...]


def differs_from_all(found: Answer, alone: Alone) -> str | None:
    """None where one of the answers is the same, else how it differs from the first."""
    return min((differs(found, answer) for answer in alone), key=lambda kind: kind is not None)


def differs(found: Answer, alone: Answer) -> str | None:
    """What kind of difference there is: None, a flip or a tie (rounding decides), or wrong."""
    steps = zip(found.tokens, found.logprobs, alone.tokens, alone.logprobs, strict=False)
    kind = None
    for step, (token, value, expected, expected_value) in enumerate(steps):
        if token != expected:
            return "flip" if alone.leads[step] < (NEAR_TIE if kind else NEAR) else "wrong"
        if abs(value - expected_value) > NEAR_TIE:
            return "wrong"
        if abs(value - expected_value) > TOLERANCE:
            kind = "tie"
    return kind


def prompts(seed: int, count: int) -> list[list[int]]:
    """From 1 to ``LONGEST`` tokens; most begin as others do and part from them anywhere."""
    generator = random.Random(seed)

    def text(length: int) -> list[int]:
        return [generator.randrange(1, VOCABULARY) for _ in range(length)]

    documents = [text(LONGEST) for _ in range(3)]
    found = [text(1), text(LONGEST)]
    while len(found) < count:
        length = int(LONGEST ** generator.uniform(0.3, 1))
        shared = generator.randrange(length) if generator.random() < 0.8 else 0
        found.append(generator.choice(documents)[:shared] + text(length - shared))
    return found


@dataclass
class Traffic:
    """One server, the prompts of a round with their answers alone, and what happened so far."""

    server: Server
    count: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    alone: list[tuple[list[int], Alone]] = field(default_factory=list)
    prompts: int = 0
    ties: set[Alone] = field(default_factory=set)  # of which prompts one was seen
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin_round(self, seed: int, size: int) -> None:
        """New prompts, each alone on an empty cache."""
        generator = random.Random(seed)
        self.alone = []
        for ids in prompts(seed, size):
            first = self._cold(ids)
            self.alone.append((ids, (first,)))
            # a page that decode steps completed is read by the conversation that goes on
            if len(ids) % 64 > 64 - NEW and len(ids) < LONGEST:
                said = [generator.randrange(1, VOCABULARY) for _ in range(300)]
                longer = [*ids, *first.tokens, *said]
                gone_on = Answer.of(self._generate(longer)["meta_info"])
                self.alone.append((longer, (self._cold(longer), gone_on)))
        self.prompts += len(self.alone)
        flush(self.server)

    def _cold(self, ids: list[int]) -> Answer:
        flush(self.server)
        return Answer.of(self._generate(ids)["meta_info"])

    def mix(self, clients: int, seconds: float, seed: int) -> None:
        """All sorts of clients until the time is over."""
        end = time.monotonic() + seconds

        def client(number: int) -> None:
            order = random.Random(f"{seed}-{number}")
            while time.monotonic() < end:
                order.choices(list(self._acts), list(self._acts.values()))[0](self, order)

        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(client, range(clients)))

    def crowd(self, size: int, longest: int) -> None:
        """As many as that at the same moment."""
        short = [known for known in self.alone if len(known[0]) <= longest]
        with ThreadPoolExecutor(size) as pool:
            answers = pool.map(
                lambda n: self._ask(*short[n % len(short)], what="crowd"), range(size)
            )
            list(answers)

    def _note(self, what: str, number: int = 1) -> None:
        with self._lock:
            self.count[what] += number

    def _check(self, found: Answer, alone: Alone, what: str, whole: bool = True) -> None:
        difference = differs_from_all(found, alone)
        if whole and len(found.tokens) != NEW:
            difference = "wrong"
        self._note("checked")
        if difference:
            self._note(difference)
        if difference == "tie":
            self.ties.add(alone)
        if difference == "wrong":
            self.wrong.append(f"{what}: {found} instead of one of {alone}")

    def _generate(self, ids: Any, **more: Any) -> Any:
        body = {"input_ids": ids, **_sampling(NEW), **more}
        answer = httpx.post(f"{self.server.url}/generate", json=body, timeout=600)
        return answer.raise_for_status().json()

    def _ask(self, ids: list[int], alone: Alone, what: str = "answer") -> None:
        self._note(what)
        self._check(Answer.of(self._generate(ids)["meta_info"]), alone, what)

    def answer(self, order: random.Random) -> None:
        self._ask(*order.choice(self.alone))

    def batch(self, order: random.Random) -> None:
        known = order.choices(self.alone, k=order.randrange(2, 6))
        self._note("batch", len(known))
        answers = self._generate([ids for ids, _ in known])
        for (_, alone), found in zip(known, answers, strict=True):
            self._check(Answer.of(found["meta_info"]), alone, "batch")

    def stream(self, order: random.Random) -> None:
        ids, alone = order.choice(self.alone)
        self._note("stream")
        *_, last = self._chunks(ids, NEW)
        self._check(Answer.of(last["meta_info"]), alone, "stream")

    def stream_and_leave(self, order: random.Random) -> None:
        ids, alone = order.choice(self.alone)
        self._note("left")
        stay = order.randrange(1, NEW)
        for number, chunk in enumerate(self._chunks(ids, 400)):
            if number == stay:
                self._check(Answer.of(chunk["meta_info"]), alone, "left", whole=False)
                return

    def _chunks(self, ids: list[int], new: int) -> Iterable[dict[str, Any]]:
        body = {"input_ids": ids, "stream": True, **_sampling(new)}
        url = f"{self.server.url}/generate"
        with httpx.stream("POST", url, json=body, timeout=600) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))

    def abort(self, order: random.Random) -> None:
        """Somewhere in its prompt, or among four hundred tokens; what came before is right."""
        ids, alone = order.choice(self.alone)
        self._note("aborted")
        rid = uuid.uuid4().hex
        after = threading.Timer(order.uniform(0, 3), self._abort, [rid])
        after.start()
        body = {"input_ids": ids, "rid": rid, **_sampling(400)}
        answer = httpx.post(f"{self.server.url}/generate", json=body, timeout=600)
        after.join()
        if answer.status_code == 200 and answer.json()["output_ids"]:
            self._check(Answer.of(answer.json()["meta_info"]), alone, "aborted", whole=False)

    def _abort(self, rid: str) -> None:
        url = f"{self.server.url}/abort_request"
        httpx.post(url, json={"rid": rid}, timeout=600).raise_for_status()

    def hang_up(self, order: random.Random) -> None:
        self._note("hung up")
        hang_up(self.server, order.choice(self.alone)[0], order.uniform(0, 2))

    def be_wrong(self, order: random.Random) -> None:
        name = order.choice(list(BAD_REQUESTS))
        self._note("refused")
        status = post(self.server, **BAD_REQUESTS[name]).status_code
        if not 400 <= status < 500:
            self.wrong.append(f"{name}: HTTP {status}")

    # how often, relative to one another
    _acts: ClassVar[dict[Callable[..., None], int]] = {
        answer: 6,
        stream: 4,
        batch: 2,
        abort: 2,
        hang_up: 2,
        stream_and_leave: 2,
        be_wrong: 2,
    }


def _sampling(new: int) -> dict[str, Any]:
    return {
        "sampling_params": {"temperature": 0, "max_new_tokens": new, "ignore_eos": True},
        "return_logprob": True,
        "top_logprobs_num": 2,
    }
