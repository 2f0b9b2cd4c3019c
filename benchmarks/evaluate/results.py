"""What was answered, kept so that an evaluation that was ended at any point can go on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from hip_sglang.journal import Journal, settle

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

    Raises ValueError where another evaluation writes there, or a line is no result.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._journal = Journal(folder / FILE)
        self.found = {result.question: result for result in self._read()}

    def settle(self, settings: Mapping[str, Any]) -> None:
        """Keep what all questions share; raises ValueError where answers to others are here."""
        settle(self._folder / SETTINGS, settings, self._journal)

    def add(self, result: Result) -> None:
        """Keep one more, before the next question counts as answered."""
        self._journal.add(_LINE.dump_python(result, mode="json"))
        self.found[result.question] = result

    def close(self) -> None:
        """Let others write there."""
        self._journal.close()

    def _read(self) -> Iterator[Result]:
        for number, known in enumerate(self._journal.known, 1):
            try:
                yield _LINE.validate_python(known)
            except ValidationError:
                raise ValueError(
                    f"{self._journal.path} line {number} is no result; take it out"
                ) from None
