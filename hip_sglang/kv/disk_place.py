"""Where a rank's pages lie on disk: one directory a model and a way to serve it.

``PATH/FINGERPRINT/manifest.json`` says what the pages there belong to, and ``rank0`` holds the
first rank's, a file each. A server that finds another one in its place takes ``rank0.2``, and so
on. This module needs neither torch nor SGLang, so that it can look at a stopped server's disk.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

MANIFEST = "manifest.json"
LOCK = "lock"
SUFFIX = ".bin"  # of a page's file
_MOST_SERVERS = 64


@dataclass(frozen=True)
class Place:
    """The directory that one rank of one running server has to itself."""

    path: Path
    lock: IO[bytes]  # held while this is open

    @classmethod
    def take(cls, root: Path, manifest: Mapping[str, Any], rank: int) -> Place:
        """The first of the rank's places that no other server holds. Raises ``OSError``."""
        home = root / fingerprint(manifest)
        # what users wrote could be told from it
        home.mkdir(0o700, parents=True, exist_ok=True)
        _write_manifest(home, manifest)
        for number in range(1, _MOST_SERVERS):
            path = home / (f"rank{rank}" if number == 1 else f"rank{rank}.{number}")
            path.mkdir(exist_ok=True)
            lock = (path / LOCK).open("wb")
            if _locked(lock):
                for left in path.glob(".*.tmp"):  # by a server that was killed as it wrote
                    left.unlink()
                return cls(path, lock)
            lock.close()
        raise OSError(f"{_MOST_SERVERS} servers use {root}")

    def release(self) -> None:
        self.lock.close()


@dataclass(frozen=True)
class Kept:
    """What belongs together on a disk: the pages of one model, served in one way."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def page_size(self) -> int:
        """Tokens of a page; there was one size before manifests said it."""
        return int(self.manifest.get("page_size", 64))

    @property
    def places(self) -> list[Path]:
        return sorted(path for path in self.path.glob("rank*") if path.is_dir())

    @property
    def files(self) -> Iterator[Path]:
        for place in self.places:
            yield from place.glob(f"*{SUFFIX}")

    @property
    def nbytes(self) -> int:
        total = 0
        for file in self.files:
            with suppress(FileNotFoundError):  # its server made room
                total += file.stat().st_size
        return total

    @property
    def in_use(self) -> bool:
        """Whether a server holds one of its places."""
        return any(is_held(place) for place in self.places)

    def drop(self) -> None:
        shutil.rmtree(self.path)


def kept_in(root: Path) -> list[Kept]:
    """All that is kept below a directory; what is not ours is left out."""
    found = []
    for manifest in sorted(root.glob(f"*/{MANIFEST}")):
        try:
            found.append(Kept(manifest.parent, json.loads(manifest.read_text())))
        except (OSError, ValueError):
            continue
    return found


def fingerprint(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]


def changed(manifest: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The names of what differs between two manifests."""
    names = sorted({*manifest, *other})
    return [name for name in names if manifest.get(name) != other.get(name)]


def is_held(place: Path) -> bool:
    """Whether a running server has this place."""
    try:
        lock = (place / LOCK).open("rb")
    except OSError:
        return False
    with lock:
        return not _locked(lock)


def _locked(lock: IO[bytes]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_manifest(home: Path, manifest: Mapping[str, Any]) -> None:
    text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    passing = home / f".{MANIFEST}.{os.getpid()}"
    passing.write_text(text)
    passing.replace(home / MANIFEST)
