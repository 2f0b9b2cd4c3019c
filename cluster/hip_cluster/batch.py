"""``python -m hip_cluster.batch``: answer a file of questions, on a running endpoint or its own."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hip_cluster import state
from hip_cluster.answers import Answers, open_answers
from hip_cluster.client import ask
from hip_cluster.jobs import READ_SECONDS, Batch, Group, Inputs
from hip_cluster.keys import read_key
from hip_cluster.up import last_words
from hip_sglang.cli_errors import CliError, one_line_errors
from hip_sglang.demo.server import unwind_on_signals
from hip_sglang.secret import Secret

app = typer.Typer(add_completion=False)
CONNECT_SECONDS = 10.0
STOP_SECONDS = 60.0
LOOK_SECONDS = 0.5


@app.command()
def batch(
    input_: Annotated[str, typer.Option("--input", help="Questions: JSON lines, file or URL.")],
    output: Annotated[str, typer.Option(help="Answers: a local file, or a folder's URL.")],
    url: Annotated[str | None, typer.Option(help="A running endpoint.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Or an endpoint's document, run for this.")
    ] = None,
    failures: Annotated[
        str | None, typer.Option(help="Where failures go; default: beside the answers.")
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, max=4096, help="Requests that run at once.")
    ] = 16,
    api_key_file: Annotated[str | None, typer.Option(help="File of the endpoint's key.")] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Variable of that key.")] = None,
) -> None:
    """Answer every question exactly once; started again it goes on where it was."""
    if (url is None) == (file is None):
        raise CliError("give --url of a running endpoint, or --file of one to run")
    with one_line_errors(), unwind_on_signals():
        inputs = Inputs(input_)
        answers = open_answers(output, failures)
        groups, total = inputs.groups(answers.known())
        if file is not None:
            from hip_cluster.cli import load

            spec = load(file)
            api_key_file, api_key_env = spec.auth.api_key_file, spec.auth.api_key_env
        key = read_key(api_key_file, api_key_env)
        try:
            if groups:
                with endpoint(file) if file else nullcontext(str(url)) as door:
                    asyncio.run(_run(door, key, inputs, answers, groups, total, concurrency))
        except ExceptionGroup as problems:
            # every worker sees the same
            raise CliError(str(problems.exceptions[0])) from None
        finally:
            answers.close()
            inputs.close()
    print(f"{total} questions, {len(answers.known())} answered or failed: {output}")


async def _run(
    url: str,
    key: Secret | None,
    inputs: Inputs,
    answers: Answers,
    groups: list[Group],
    total: int,
    concurrency: int,
) -> None:
    headers = {"Authorization": f"Bearer {key!s}"} if key else {}
    columns = (TextColumn("answered"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    limits = httpx.Limits(max_connections=concurrency)
    timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=total, completed=len(answers.known()))
        async with httpx.AsyncClient(
            base_url=url, headers=headers, limits=limits, timeout=timeout
        ) as client:
            run = Batch(client, inputs, answers, concurrency, lambda: progress.advance(bar))
            await run.run(groups)


@contextmanager
def endpoint(file: Path) -> Iterator[str]:
    """The URL of an endpoint that runs for the time of the batch; without ``RAY_ADDRESS`` on a Ray
    of its own."""
    from hip_cluster.spec import EndpointSpec

    name = EndpointSpec.load(file).name
    _wait_for_the_last_one(name)
    command = [sys.executable, "-m", "hip_cluster.serve", str(file)]
    command += [] if "RAY_ADDRESS" in os.environ else ["--own-ray"]
    log = state.folder_of(name) / "supervisor.log"
    print(f"endpoint {name}: log in {log}", file=sys.stderr)
    with log.open("wb") as output:
        # a driver that is killed leaves no endpoint behind
        child = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, preexec_fn=_end_with_parent
        )
    try:
        yield _when_ready(child, name, log)
    finally:
        child.terminate()
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _wait_for_the_last_one(name: str) -> None:
    """The endpoint of a driver that was killed a moment ago is on its way out."""
    deadline = time.monotonic() + STOP_SECONDS
    with suppress(ValueError):
        while ask(name, "GET", "/status") and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)


def _when_ready(child: subprocess.Popen[bytes], name: str, log: Path) -> str:
    while child.poll() is None:
        with suppress(ValueError):
            status = ask(name, "GET", "/status")
            urls = [one["url"] for one in status["replicas"] if one["clients"]]
            if urls:
                return str(status["router"]["url"] or urls[0])
        time.sleep(LOOK_SECONDS)
    raise ChildProcessError(last_words(log, child.returncode).removeprefix("hip-cluster: "))


def main() -> None:
    """The entry point; what the user can mend is one line on stderr."""
    from typer.exceptions import TyperException

    try:
        code = typer.main.get_command(app).main(
            prog_name="python -m hip_cluster.batch", standalone_mode=False
        )
    except TyperException as error:
        print(f"hip-cluster: {error.format_message()}", file=sys.stderr)
        code = 2
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
