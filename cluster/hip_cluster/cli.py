"""``hip-cluster``: describe, start and steer endpoints of many machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from hip_cluster.spec import EndpointSpec, SpecError
from hip_sglang.cli_errors import CliError, one_line_errors

app = typer.Typer(
    help="HiP attention on many machines: endpoints and jobs on Ray.",
    add_completion=False,
    no_args_is_help=True,
)

File = Annotated[Path, typer.Option("--file", "-f", help="The endpoint's document, YAML.")]
Name = Annotated[str, typer.Argument(help="The endpoint's name.")]
Url = Annotated[
    str | None,
    typer.Option(help="Its supervisor, where that is not on this machine; $HIP_SGLANG_TOKEN."),
]


def main() -> None:
    """The entry point of the ``hip-cluster`` program."""
    sys.exit(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
    """Run one command line; what the user can mend is on stderr, with exit code 2."""
    command = typer.main.get_command(app)
    try:
        code = command.main(args=argv, prog_name="hip-cluster", standalone_mode=False)
    except TyperException as error:
        print(f"hip-cluster: {error.format_message()}", file=sys.stderr)
        return 2
    except typer.Abort:
        return 130
    return code if isinstance(code, int) else 0


@contextmanager
def spec_errors() -> Iterator[None]:
    """Show each problem of a document on a line of its own."""
    try:
        yield
    except SpecError as error:
        raise CliError(str(error).replace("\n", "\nhip-cluster: ")) from None


def load(file: Path) -> EndpointSpec:
    """The document, or its problems as lines."""
    with spec_errors():
        return EndpointSpec.load(file)


@app.command()
def validate(file: File) -> None:
    """Check a document and say nothing more of it than that."""
    spec = load(file)
    print(f"{file}: endpoint {spec.name} is valid")


@app.command()
def schema() -> None:
    """Print the JSON schema of the document."""
    draft = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    print(json.dumps(draft | EndpointSpec.model_json_schema(), indent=2))


@app.command()
def explain(
    file: File,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what will be placed where, and how much memory it needs, before anything runs."""
    from hip_cluster.explain import facts, sentences

    spec = load(file)
    with one_line_errors():
        print(json.dumps(facts(spec), indent=2) if as_json else "\n".join(sentences(spec)))


@app.command()
def up(
    file: File,
    address: Annotated[
        str | None,
        typer.Option(help="Ray's address; default: $RAY_ADDRESS, or Ray is started here."),
    ] = None,
) -> None:
    """Start an endpoint and show how it is, until Ctrl-C or `hip-cluster down`."""
    from hip_cluster.up import run_endpoint

    spec = load(file)
    with one_line_errors():
        raise typer.Exit(run_endpoint(spec, file, address))


@app.command()
def status(
    name: Name,
    url: Url = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show an endpoint's replicas and ranks."""
    from hip_cluster.client import ask
    from hip_cluster.view import show

    with one_line_errors():
        answer = ask(name, "GET", "/status", url)
    if as_json:
        print(json.dumps(answer, indent=2))
    else:
        show(answer)


@app.command()
def logs(
    name: Name,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as it grows.")] = False,
    router: Annotated[bool, typer.Option("--router", help="The router's instead.")] = False,
) -> None:
    """Print what the supervisor and its ranks wrote."""
    from hip_cluster.client import print_log

    with one_line_errors():
        print_log(name, "router.log" if router else "supervisor.log", follow)


@app.command()
def scale(
    name: Name,
    replicas: Annotated[int, typer.Argument(min=1, max=1024, help="How many from now on.")],
    url: Url = None,
) -> None:
    """Change how many replicas there are, without losing a request."""
    _command(name, "/scale", url, {"replicas": replicas})


@app.command()
def restart(name: Name, url: Url = None) -> None:
    """Replace one replica after another."""
    _command(name, "/restart", url)


@app.command()
def drain(name: Name, url: Url = None) -> None:
    """Take no new requests, let those that run end, then end the endpoint."""
    _command(name, "/drain", url)


@app.command()
def down(name: Name, url: Url = None) -> None:
    """End an endpoint at once."""
    _command(name, "/down", url)


@app.command()
def submit(
    file: File,
    address: Annotated[
        str, typer.Option(help="Ray's job server, such as http://head:8265.")
    ] = "http://127.0.0.1:8265",
    wait: Annotated[bool, typer.Option(help="Follow the job's log until it ends.")] = True,
) -> None:
    """Run an endpoint as a job of a Ray cluster; the same document runs once."""
    from hip_cluster.submit import submit_endpoint

    spec = load(file)
    with one_line_errors():
        raise typer.Exit(submit_endpoint(spec, file, address, wait))


def _command(name: str, path: str, url: str | None, body: dict[str, int] | None = None) -> None:
    from hip_cluster.client import ask
    from hip_cluster.view import show

    with one_line_errors():
        show(ask(name, "POST", path, url, body or {}))


if __name__ == "__main__":
    main()
