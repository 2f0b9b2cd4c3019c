"""``hip-cluster up``: the supervisor as a child process, and a view of it.

A child, for Ray's libraries abort the process that loses Ray's head: then it is started again.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from rich.console import Console
from rich.live import Live

from hip_cluster import state
from hip_cluster.client import ask
from hip_cluster.serve import LOST
from hip_cluster.spec import EndpointSpec
from hip_cluster.view import table_of
from hip_sglang.demo.server import unwind_on_signals

LOOK_SECONDS = 0.5
STOP_SECONDS = 60.0
ORPHAN_SECONDS = 5.0
SWEEP_SECONDS = 1.0


def run_endpoint(spec: EndpointSpec, file: Path, address: str | None) -> int:
    """Run it until it ends; the exit code. Raises ValueError where the name is taken.

    Where Ray was started here and its head dies, all of it is started again, within the budget of
    ``limits``.
    """
    _require_free_name(spec.name)
    log = state.folder_of(spec.name) / "supervisor.log"
    own = address is None and "RAY_ADDRESS" not in os.environ
    console = Console()
    console.print(f"endpoint {spec.name}: log in {log}", soft_wrap=True)
    _adopt_orphans()
    lost: list[float] = []
    with unwind_on_signals():
        while True:
            code = _run_once(file, address, own, log, spec.name, console)
            if code != LOST or not own:
                break
            now = time.monotonic()
            lost = [at for at in lost if now - at < spec.limits.window_s] + [now]
            if len(lost) > spec.limits.restarts:
                break
            console.print("Ray's head is gone; starting again", soft_wrap=True)
    if code not in (0, 130):
        print(last_words(log, code), file=sys.stderr)
    return code


def _run_once(
    file: Path, address: str | None, own: bool, log: Path, name: str, console: Console
) -> int:
    command = [sys.executable, "-m", "hip_cluster.serve", str(file)]
    command += ["--own-ray"] if own else ["--address", address or os.environ["RAY_ADDRESS"]]
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _watch(child, name, console)
    except KeyboardInterrupt:
        console.print("ending")
    finally:
        _end(child)
        _end_orphans()
    # a child that was killed is no success
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _watch(child: subprocess.Popen[bytes], name: str, console: Console) -> None:
    shown: Any = None
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while child.poll() is None:
            time.sleep(LOOK_SECONDS)
            try:
                status = ask(name, "GET", "/status")
            except ValueError:
                # not yet, or not any more
                continue
            if console.is_terminal:
                live.update(table_of(status), refresh=True)
            elif (states := [(r["replica"], r["state"]) for r in status["replicas"]]) != shown:
                # a log gets a line a change
                shown = states
                words = ", ".join(f"replica {index} {state}" for index, state in states)
                console.print(f"{time.strftime('%H:%M:%S')} {words}", soft_wrap=True)


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
    child.wait()


def _adopt_orphans() -> None:
    """What the child leaves behind where it is killed becomes ours to end: Ray's agents stay a
    minute otherwise, with their ports."""
    set_child_subreaper = 36
    ctypes.CDLL(None).prctl(set_child_subreaper, 1)


def _end_orphans() -> None:
    orphans = psutil.Process().children(recursive=True)
    # janitors end by themselves, when they have swept
    _, orphans = psutil.wait_procs(orphans, SWEEP_SECONDS)
    for orphan in orphans:
        with suppress(psutil.NoSuchProcess):
            orphan.kill()
    psutil.wait_procs(orphans, ORPHAN_SECONDS)


def _require_free_name(name: str) -> None:
    try:
        ask(name, "GET", "/status")
    except ValueError:
        return
    raise ValueError(
        f"endpoint {name} is running already; end it with `hip-cluster down {name}`, or give this "
        "one another name"
    )


def last_words(log: Path, code: int) -> str:
    """Why a supervisor ended with this code, in one line, by its log."""
    lines = log.read_text(errors="replace").splitlines()
    ours = [line for line in lines if line.startswith("hip-cluster: ")]
    if ours:
        return ours[-1]
    said = [line for line in lines if re.search(r"\S", line)]
    return f"hip-cluster: the supervisor ended with code {code}: {said[-1] if said else ''} ({log})"
