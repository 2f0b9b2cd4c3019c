"""What was answered, kept so that an evaluation that was ended at any point can go on."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

FILE, SETTINGS = "results.jsonl", "settings.json"


@dataclass(frozen=True)
class Question:
    """Which sample, and who is asked."""

    preset: str
    task: str
    length: int
    index: int


@dataclass(frozen=True)
class Result:
    """What was answered to one."""

    question: Question
    score: float
    said: str
    answers: tuple[str, ...]
    depths: tuple[float, ...]
    prompt_tokens: int


_LINE = TypeAdapter(Result)


class Results:
    """``results.jsonl`` of one folder, and the settings that all of its lines share.

    Each line is on the disk before the next question counts as answered; a last line that was not
    written to its end is taken off. Raises ValueError where another evaluation writes there, or a
    line is no result.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._file: BinaryIO = (folder / FILE).open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"another evaluation writes to {folder}; wait for it, or give another --out"
            ) from None
        self.found = {result.question: result for result in self._repaired()}

    def settle(self, settings: Mapping[str, Any]) -> None:
        """Keep what all questions share; raises ValueError where answers to others are here."""
        path = self._folder / SETTINGS
        if self.found and path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            for name, value in settings.items():
                if before.get(name) != value:
                    raise ValueError(
                        f"{self._folder} holds answers with {name}={before.get(name)!r}, and this "
                        f"is {name}={value!r}; give another --out"
                    )
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def add(self, result: Result) -> None:
        """Keep one more."""
        self._file.write(_LINE.dump_json(result) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.found[result.question] = result

    def close(self) -> None:
        """Let others write there."""
        self._file.close()

    def _repaired(self) -> Iterator[Result]:
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                yield _LINE.validate_json(line)
            except ValidationError:
                raise ValueError(
                    f"{self._folder / FILE} line {number} is no result; take it out"
                ) from None
            whole += len(line)
        self._file.truncate(whole)
        self._file.seek(0, os.SEEK_END)
