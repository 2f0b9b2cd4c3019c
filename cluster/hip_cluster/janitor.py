"""Removes what a process leaves behind where it is killed: SGLang's shared memory and sockets.

A process cannot do that for itself, so it has a small child that waits for its end. The child runs
this file alone, and imports nothing of ours.
"""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys


class Janitor:
    """The child of this process. What it is told to sweep are patterns of paths."""

    def __init__(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            text=True,
            # who ends our process group does not end it
            start_new_session=True,
        )
        # SGLang's own, which have the process in their name
        self.sweep_later(f"/dev/shm/sgl_shm_*_{os.getpid()}_*")

    def sweep_later(self, *patterns: str) -> None:
        """Remove these, too, when this process has ended."""
        assert self._child.stdin is not None
        for pattern in patterns:
            self._child.stdin.write(pattern + "\n")
        self._child.stdin.flush()


def main() -> None:
    """Read patterns until the parent is gone, then remove what they match."""
    for pattern in sys.stdin.read().splitlines():
        for path in glob.glob(pattern):
            if os.path.isdir(path):
                shutil.rmtree(path, ignore_errors=True)
                continue
            try:
                os.unlink(path)
            except OSError:
                continue


if __name__ == "__main__":
    main()
