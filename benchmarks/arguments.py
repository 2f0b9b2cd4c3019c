"""The command line of a benchmark: what cannot be used is one line."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from hip_kernels.page_size import PAGE_SIZES, VARIABLE, page_size

from hip_sglang.config import HipConfig
from hip_sglang.demo.model import BUILTIN, write_model

TRAINED = "trained"


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

    def add_model(self) -> None:
        """Which model, and in which pages; for ``model_of`` and ``settle_pages``."""
        self.add_argument(
            "--model", default=BUILTIN,
            help=f"a model's directory, {BUILTIN}, or {TRAINED}: the small one of benchmarks/train",
        )  # fmt: skip
        self.add_argument(
            "--page-size", type=int, choices=PAGE_SIZES, default=page_size(),
            help="tokens of our pages",
        )  # fmt: skip


def settle_pages(size: int) -> None:
    """Start this process again where its pages have another size: all code is made for one."""
    if size != page_size():
        os.environ[VARIABLE] = str(size)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def model_of(name: str, folder: Path) -> Path:
    """The directory of a model; the built-in one is written to ``folder``."""
    if name == TRAINED:
        return Path(__file__).parent / TRAINED
    if name != BUILTIN:
        return Path(name)
    write_model(folder / "model")
    return folder / "model"


def name_of(model: str) -> str:
    """As rows have it."""
    return model if model in (BUILTIN, TRAINED) else Path(model).resolve().name


def at_least(least: int, **values: int) -> None:
    """Raise ValueError for the first option whose value is below ``least``."""
    for name, value in values.items():
        if value < least:
            raise ValueError(
                f"--{name.replace('_', '-')} {value} is too small; give {least:,} or more"
            )


def given_of(config: HipConfig) -> dict[str, Any]:
    """The preset, where it is not the default one, and what differs from it."""
    plain = HipConfig(preset=config.preset).model_dump(mode="json")
    own = {key: it for key, it in config.model_dump(mode="json").items() if it != plain[key]}
    return own if config.preset == HipConfig().preset else {"preset": config.preset, **own}
