"""Runs a benchmark as the command line does, and reads what it says."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hip_sglang import cli
from hip_sglang.bench import load_bench
from hip_sglang.demo.model import write_model

Rows = Callable[[], list[dict[str, str]]]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """A benchmark is a process of its own and may decide how many threads it has."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench") / "model"
    write_model(directory)
    return directory


@pytest.fixture
def written_once(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks find the model written, which takes them seconds otherwise."""

    def copy(directory: Path) -> None:
        shutil.copytree(model_directory, directory, dirs_exist_ok=True)

    for name in ("serve", "retrieval", "evaluate.run"):
        monkeypatch.setattr(load_bench(name), "write_model", copy)


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """``bench(name, *arguments)`` -> the JSON object of its last line."""

    def run(*arguments: str) -> dict[str, Any]:
        assert cli.run(["bench", *arguments, "--json"]) == 0
        last: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return last

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``refused(name, *arguments)`` -> the one line that is said with exit code 2."""

    def run(*arguments: str) -> str:
        assert cli.run(["bench", *arguments]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1, said.err
        return said.err

    return run


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rows:
    """The rows that were appended, in a folder that only this test has."""
    rows = load_bench("rows")
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")

    def read() -> list[dict[str, str]]:
        found = []
        for path in sorted((tmp_path / "results").glob("*.csv")):
            with path.open(newline="", encoding="utf-8") as file:
                found += list(csv.DictReader(file))
        return found

    return read
