"""JSON lines that survive a kill at any point."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class Journal:
    """One file of JSON lines, which one process at a time appends to.

    Each line is on the disk before ``add`` returns; a last line that was not written to its end is
    taken off. Raises ValueError where the file cannot be written, another process writes it, or
    a line is not JSON.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("a+b")
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}; name a file that can be written") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ValueError(
                f"{path}: another process writes it; wait for it, or name another"
            ) from None
        self.known: list[Any] = list(self._repaired())

    def add(self, what: Any) -> None:
        """Keep one more."""
        self._file.write(line_of(what))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let others write."""
        self._file.close()

    def _repaired(self) -> Iterator[Any]:
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                yield json.loads(line)
            except ValueError:
                raise ValueError(f"{self.path} line {number} is no JSON; take it out") from None
            whole += len(line)
        self._file.truncate(whole)
        self._file.seek(0, os.SEEK_END)


def settle(path: Path, settings: Mapping[str, Any], journal: Journal) -> None:
    """Keep what all lines of a journal have in common, in a file beside it.

    Raises ValueError where there are lines already, and they have something else in common.
    """
    text = json.dumps(settings, indent=2) + "\n"
    if path.exists() and (known := path.read_text(encoding="utf-8")) != text and journal.known:
        try:
            before = json.loads(known)
        except ValueError:
            raise ValueError(f"{path} is no JSON; give another --out") from None
        for name, value in json.loads(text).items():
            if before.get(name) != value:
                raise ValueError(
                    f"{path.parent} was begun with {name}={before.get(name)!r}, and this is "
                    f"{name}={value!r}; give another --out"
                )
    new = path.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def line_of(what: Any) -> bytes:
    return json.dumps(what, ensure_ascii=False).encode() + b"\n"
