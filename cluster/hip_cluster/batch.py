"""``python -m hip_cluster.batch``: answer a file of questions, on a running endpoint or its own."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hip_cluster.answers import Answers, open_answers
from hip_cluster.jobs import READ_SECONDS, Batch, Group, Inputs
from hip_cluster.keys import read_key
from hip_sglang.cli_errors import CliError, one_line_errors
from hip_sglang.demo.server import unwind_on_signals
from hip_sglang.secret import Secret

app = typer.Typer(add_completion=False)
CONNECT_SECONDS = 10.0
STOP_SECONDS = 60.0


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
            url = f"http://{spec.server.host}:{spec.server.port}"
        key = read_key(api_key_file, api_key_env)
        try:
            if groups:
                with endpoint(file):
                    asyncio.run(_run(str(url), key, inputs, answers, groups, total, concurrency))
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
def endpoint(file: Path | None) -> Iterator[None]:
    """An endpoint for the time of the batch, where a document is given."""
    if file is None:
        yield
        return
    command = [sys.executable, "-m", "hip_cluster.serve", str(file)]
    child = subprocess.Popen(command, stdout=sys.stderr)
    try:
        _wait_until_ready(child, file)
        yield
    finally:
        child.terminate()
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _wait_until_ready(child: subprocess.Popen[bytes], file: Path) -> None:
    from hip_cluster import state
    from hip_cluster.spec import EndpointSpec

    name = EndpointSpec.load(file).name
    while child.poll() is None:
        try:
            door = state.read_door(name)
            if httpx.get(f"{door.url}/ready", timeout=5).status_code == 200:
                return
        except (ValueError, httpx.TransportError):
            pass
        time.sleep(0.5)
    raise ChildProcessError(f"the endpoint of {file} ended with code {child.returncode}")


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
