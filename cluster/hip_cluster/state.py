"""Where a running endpoint is found by its name: one folder a name, for this user alone."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

HOME_VARIABLE = "HIP_SGLANG_CLUSTER_HOME"


@dataclass(frozen=True)
class Door:
    """How its supervisor is reached."""

    url: str
    token: str
    pid: int


def home() -> Path:
    """The folder of all endpoints: ``~/.hip-cluster``, or what the variable says."""
    return Path(os.environ.get(HOME_VARIABLE) or Path.home() / ".hip-cluster")


def folder_of(name: str) -> Path:
    """The folder of one endpoint, made where it is not there."""
    folder = home() / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def write_door(name: str, door: Door) -> None:
    """Tell this user's other programs how to reach the supervisor."""
    path = folder_of(name) / "door.json"
    path.touch(mode=0o600)
    path.write_text(json.dumps(asdict(door)))


def read_door(name: str) -> Door:
    """Raises ValueError where no such endpoint runs on this machine."""
    try:
        return Door(**json.loads((home() / name / "door.json").read_text()))
    except (OSError, ValueError, TypeError):
        raise ValueError(
            f"no endpoint {name!r} runs here; start it with `hip-cluster up -f FILE`, or name its "
            "supervisor with --url"
        ) from None


def remove_door(name: str) -> None:
    """The endpoint is gone."""
    (home() / name / "door.json").unlink(missing_ok=True)


def forget(name: str) -> None:
    """Remove all that is kept of it."""
    shutil.rmtree(home() / name, ignore_errors=True)
