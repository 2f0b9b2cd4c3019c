"""Offline batches: many questions of long documents, each answered exactly once.

Questions of one document go to the server one after the first, so that the document is read once
and the others find it in the prefix cache.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import fsspec
import httpx

from hip_cluster.answers import Answers, store_errors

# questions whose first characters agree are taken to be of one document
PREFIX_CHARACTERS = 4096
READ_SECONDS = 7200.0
PAUSES_SECONDS = (0.5, 1, 2, 4, 8, 15, 30, 60, 60, 60, 60, 60)


@dataclass(frozen=True)
class Question:
    """One input line, by where it stands: documents are long, and read when they are sent."""

    id: str
    offset: int


@dataclass
class Group:
    """The questions of one document that are not answered yet."""

    first: Question
    others: deque[Question] = field(default_factory=deque)


class Inputs:
    """JSON lines ``{"id", "document", "prompt", "sampling_params"}`` of any fsspec URL.

    ``document`` is put before ``prompt``; without an ``id`` a line's number is it. Raises
    ValueError, naming the line, for what is no question.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        with store_errors(f"--input {url}", "name a file of JSON lines"):
            self._file = fsspec.open(url, "rb").open()

    def groups(self, answered: set[str]) -> tuple[list[Group], int]:
        """The questions that are open, by document, and how many lines there are in all."""
        groups: dict[bytes, Group] = {}
        seen: set[str] = set()
        for number, offset, line in self._lines():
            record = self._parse(number, line)
            name = str(record.get("id", number))
            if name in seen:
                raise ValueError(f"{self._url} line {number}: id {name!r} stands twice; mend one")
            seen.add(name)
            if name in answered:
                continue
            start = text_of(record)[:PREFIX_CHARACTERS]
            document = str(record.get("document") or start)
            key = hashlib.sha256(document.encode()).digest()
            question = Question(name, offset)
            if key in groups:
                groups[key].others.append(question)
            else:
                groups[key] = Group(question)
        return list(groups.values()), len(seen)

    def read(self, question: Question) -> dict[str, Any]:
        """The whole line again."""
        with store_errors(self._url, "start the batch again when it can be read"):
            self._file.seek(question.offset)
            record: dict[str, Any] = json.loads(self._file.readline())
        return record

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        self._file.seek(0)
        offset = 0
        for number, line in enumerate(self._file, start=1):
            if line.strip():
                yield number, offset, line
            offset += len(line)

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        where = f"{self._url} line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON: {error}; mend it there") from None
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise ValueError(f'{where}: expected an object with a text "prompt"')
        if unknown := set(record) - {"id", "document", "prompt", "sampling_params"}:
            raise ValueError(f"{where}: unknown key {sorted(unknown)[0]!r}; take it out")
        return record


def text_of(record: dict[str, Any]) -> str:
    """What the model reads."""
    return str(record.get("document") or "") + str(record["prompt"])


class Batch:
    """Sends what is open, never more than ``concurrency`` at once, and keeps what comes back."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        inputs: Inputs,
        answers: Answers,
        concurrency: int,
        on_answer: Callable[[], None],
    ) -> None:
        self._client, self._inputs, self._answers = client, inputs, answers
        self._concurrency, self._on_answer = concurrency, on_answer

    async def run(self, groups: list[Group]) -> None:
        """Until every question is answered or has failed for good.

        Raises ConnectionError where the server stays away for minutes.
        """
        self._waiting = deque(groups)
        # followers of documents that were read, which go before new documents
        self._ready: deque[Question] = deque()
        self._reading = 0
        self._news = asyncio.Condition()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._concurrency):
                tasks.create_task(self._work())

    async def _work(self) -> None:
        while True:
            async with self._news:
                # a document that is being read may leave questions for everybody
                await self._news.wait_for(lambda: self._ready or self._waiting or not self._reading)
                follower = self._ready.popleft() if self._ready else None
                group = self._waiting.popleft() if self._waiting and not follower else None
                self._reading += group is not None
            if follower is not None:
                await self._answer(follower)
            elif group is not None:
                await self._answer(group.first)
                async with self._news:
                    self._reading -= 1
                    self._ready.extend(group.others)
                    self._news.notify_all()
            else:
                return

    async def _answer(self, question: Question) -> None:
        record = self._inputs.read(question)
        body = {"text": text_of(record), "sampling_params": record.get("sampling_params", {})}
        answer = await self._ask(body)
        if answer.is_error:
            failure = {"id": question.id, "status": answer.status_code, "error": answer.text[:500]}
            self._answers.add(failure, failed=True)
        else:
            content = answer.json()
            meta = content["meta_info"]
            told = ("prompt_tokens", "completion_tokens", "cached_tokens", "finish_reason")
            kept = {name: meta.get(name) for name in told}
            self._answers.add({"id": question.id, "text": content["text"], **kept}, failed=False)
        self._on_answer()

    async def _ask(self, body: dict[str, Any]) -> httpx.Response:
        """Again and again while the server is away or starting; its refusals are answers."""
        problem = ""
        for pause in PAUSES_SECONDS:
            try:
                answer = await self._client.post("/generate", json=body)
                if answer.status_code < 500 and answer.status_code not in (401, 403, 408, 429):
                    return answer
                problem = f"{answer.status_code} {answer.text[:200]}"
                if answer.status_code in (401, 403):
                    raise PermissionError("the server refused the key; see --api-key-file")
            except httpx.TransportError as error:
                problem = str(error) or type(error).__name__
            await asyncio.sleep(pause)
        raise ConnectionError(f"the server does not answer: {problem}")
