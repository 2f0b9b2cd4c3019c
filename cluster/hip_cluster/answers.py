"""Where a batch's answers go, so that a driver that is killed at any point can go on.

A local file is appended to, and each line is on the disk before the next request is counted as
answered. Object stores cannot append: there answers go into numbered parts, and a manifest names
the parts that count.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from hip_sglang.journal import Journal, line_of

PART_ANSWERS = 64
PART_SECONDS = 30.0


class Answers(ABC):
    """Answers and failures of one batch."""

    @abstractmethod
    def known(self) -> set[str]:
        """The ids that have been answered, or have failed, in this run or an earlier one."""

    @abstractmethod
    def add(self, answer: dict[str, Any], *, failed: bool) -> None:
        """Keep one more."""

    @abstractmethod
    def close(self) -> None:
        """Keep what is still held back."""


def open_answers(output: str, failures: str | None) -> Answers:
    """A local file, or a folder of any filesystem that fsspec knows (``s3://bucket/folder``).

    Raises ValueError where it cannot be written, or another driver writes it.
    """
    if "://" in output:
        if failures is not None:
            raise ValueError(f"--failures goes with a local --output; {output} holds them itself")
        return Parts(output)
    return Files(Path(output), Path(failures) if failures else failures_beside(Path(output)))


def failures_beside(output: Path) -> Path:
    """out.jsonl -> out.failures.jsonl"""
    return output.with_suffix(f".failures{output.suffix}")


class Files(Answers):
    """Two local files of JSON lines."""

    def __init__(self, output: Path, failures: Path) -> None:
        self._files = {False: Journal(output), True: Journal(failures)}
        self._known = {str(one["id"]) for file in self._files.values() for one in file.known}

    def known(self) -> set[str]:
        return self._known

    def add(self, answer: dict[str, Any], *, failed: bool) -> None:
        self._files[failed].add(answer)
        self._known.add(str(answer["id"]))

    def close(self) -> None:
        for file in self._files.values():
            file.close()


@contextmanager
def store_errors(url: str, remedy: str) -> Iterator[None]:
    """Raise ValueError, in one line, for whatever a store's own library raises."""
    try:
        yield
    except Exception as error:
        said = str(error).strip() or type(error).__name__
        raise ValueError(f"{url}: {said}; {remedy}") from None


class Parts(Answers):
    """Numbered parts in a folder; what the manifest does not name was never answered."""

    def __init__(self, folder: str) -> None:
        self._url = folder
        with store_errors(folder, "install what this filesystem needs"):
            self._system, self._folder = fsspec.url_to_fs(folder)
        self._manifest = f"{self._folder.rstrip('/')}/manifest.json"
        self._parts: list[dict[str, Any]] = []
        with store_errors(folder, "see that it can be reached, read and written"):
            self._system.makedirs(self._folder, exist_ok=True)
            if self._system.exists(self._manifest):
                self._parts = json.loads(self._system.cat_file(self._manifest))["parts"]
            self._known = {
                str(json.loads(line)["id"])
                for part in self._parts
                for line in self._system.cat_file(self._path(part["name"])).splitlines()
            }
        self._held: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
        self._kept_at = time.monotonic()

    def known(self) -> set[str]:
        return self._known

    def add(self, answer: dict[str, Any], *, failed: bool) -> None:
        self._held[failed].append(answer)
        self._known.add(str(answer["id"]))
        count = sum(map(len, self._held.values()))
        if count >= PART_ANSWERS or time.monotonic() - self._kept_at > PART_SECONDS:
            self._keep()

    def close(self) -> None:
        self._keep()

    def _keep(self) -> None:
        with store_errors(self._url, "start the batch again when it can be written"):
            self._write()
        self._kept_at = time.monotonic()

    def _write(self) -> None:
        for failed, answers in self._held.items():
            if answers:
                kind = "failures" if failed else "answers"
                name = f"{kind}-{len(self._parts):06d}.jsonl"
                # a part without its line in the manifest is written over by who comes next
                self._system.pipe_file(self._path(name), b"".join(map(line_of, answers)))
                self._parts.append({"name": name, "answers": len(answers), "failed": failed})
                answers.clear()
        text = json.dumps({"parts": self._parts}, indent=1)
        self._system.pipe_file(self._manifest, text.encode())

    def _path(self, name: str) -> str:
        return f"{self._folder.rstrip('/')}/{name}"
