"""Fetches a model into a volume once, or waits until it is there; runs in the chart's pods.

``fetch`` downloads one commit of a repository, compares each file with the checksum that the hub
has for it, and only then writes the marker. ``wait`` returns when the marker names the same commit
and every file has the size that it had.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

MARKER = ".hip-sglang-model.json"
POLL_SECONDS = 10


def main(arguments: list[str]) -> int:
    path = Path(os.environ["HIP_MODEL_PATH"])
    wanted = {
        "repository": os.environ["HIP_MODEL_REPOSITORY"],
        "revision": os.environ["HIP_MODEL_REVISION"],
    }
    if arguments == ["wait"]:
        while problem := missing(path, wanted):
            print(f"waiting: {problem}", flush=True)
            time.sleep(POLL_SECONDS)
    elif arguments == ["fetch"]:
        if problem := missing(path, wanted):
            print(f"{problem}: downloading", flush=True)
            fetch(path, wanted, json.loads(os.environ["HIP_MODEL_PATTERNS"]))
    else:
        print("usage: model.py fetch|wait", file=sys.stderr)
        return 2
    print(f"{path} holds {wanted['repository']} at {wanted['revision']}")
    return 0


def missing(path: Path, wanted: dict[str, str]) -> str | None:
    """What is wrong with the model in the volume; None: nothing."""
    try:
        marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{path} holds no complete model"
    if {key: marker.get(key) for key in wanted} != wanted:
        return f"{path} holds {marker.get('repository')} at {marker.get('revision')}"
    for name, size in marker["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{file} is not as it was downloaded"
    return None


def fetch(path: Path, wanted: dict[str, str], patterns: list[str]) -> None:
    from huggingface_hub import HfApi, snapshot_download

    path.mkdir(parents=True, exist_ok=True)
    (path / MARKER).unlink(missing_ok=True)
    snapshot_download(
        wanted["repository"],
        revision=wanted["revision"],
        local_dir=path,
        allow_patterns=patterns,
    )
    info = HfApi().repo_info(wanted["repository"], revision=wanted["revision"], files_metadata=True)
    files = {}
    for entry in info.siblings or []:
        file = path / entry.rfilename
        if file.is_file():
            compare(file, entry)
            files[entry.rfilename] = file.stat().st_size
    if not files:
        raise SystemExit(f"{wanted['repository']} has no file that matches {patterns}")
    partial = path / f"{MARKER}.new"
    partial.write_text(json.dumps(wanted | {"files": files}), encoding="utf-8")
    partial.replace(path / MARKER)


def compare(file: Path, entry: Any) -> None:
    """The hub has SHA-256 of large files, and git's own SHA-1 of the others."""
    if entry.lfs is not None:
        expected, digest = entry.lfs.sha256, hashlib.sha256()
    else:
        expected, digest = entry.blob_id, hashlib.sha1(usedforsecurity=False)
        digest.update(f"blob {file.stat().st_size}\0".encode())
    with file.open("rb") as content:
        while block := content.read(1 << 22):
            digest.update(block)
    if digest.hexdigest() != expected:
        file.unlink()
        raise SystemExit(
            f"{file} has the checksum {digest.hexdigest()}, not {expected}; removed it"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
