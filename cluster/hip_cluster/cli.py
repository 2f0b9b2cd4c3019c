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


if __name__ == "__main__":
    main()
