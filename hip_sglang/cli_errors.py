"""What the command line says when something is wrong: one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from typer.exceptions import TyperException


class CliError(TyperException):
    """Something the user can mend: shown as one line, exit code 2."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn the errors that our own code words for people into ``CliError``."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise CliError(" ".join(str(error).split())) from error
