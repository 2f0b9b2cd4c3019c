"""The command line of a benchmark: what cannot be used is one line."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Raises ValueError where argparse would print its usage; `hip-sglang` makes it one line."""

    def __init__(self, bench: str, description: str | None) -> None:
        super().__init__(prog=f"hip-sglang bench {bench}", description=description)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")

    def add_output(self) -> None:
        """What every benchmark can do with its results."""
        self.add_argument("--json", action="store_true", help="end with one JSON object")
        self.add_argument("--save", action="store_true", help="append rows to benchmarks/results")


def at_least(least: int, **values: int) -> None:
    """Raise ValueError for the first option whose value is below ``least``."""
    for name, value in values.items():
        if value < least:
            raise ValueError(
                f"--{name.replace('_', '-')} {value} is too small; give {least:,} or more"
            )
