"""A model that is trained again is another one."""

from __future__ import annotations

from pathlib import Path

import pytest

from hip_sglang.fingerprint import SAMPLE, fingerprint

SIZE = 40 * SAMPLE + 7


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(SIZE))
    return tmp_path


def test_the_same_files_are_the_same_model(model: Path) -> None:
    assert fingerprint(model) == fingerprint(model)
    before = fingerprint(model)
    (model / "notes.txt").write_text("of no matter")
    assert fingerprint(model) == before


@pytest.mark.parametrize("place", [0, SIZE // 2, SIZE - 1])
def test_weights_of_the_same_size_are_told_apart(model: Path, place: int) -> None:
    before = fingerprint(model)
    # training changes weights everywhere
    weights = bytearray(SIZE)
    for at in range(max(0, place - SIZE // 16), min(SIZE, place + SIZE // 16)):
        weights[at] = 1
    (model / "model.safetensors").write_bytes(weights)
    assert fingerprint(model) != before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "pytorch_model.bin"])
def test_other_files_count_too(model: Path, name: str) -> None:
    before = fingerprint(model)
    (model / name).write_text('{"changed": 1}')
    assert fingerprint(model) != before
