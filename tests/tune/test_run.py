"""``hip-sglang tune`` as a user runs it: on a tiny model, killed, and started again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hip_sglang.cli import run
from hip_sglang.config import HipConfig
from hip_sglang.tune import run as tuning
from tests.tiny_llama import write_tiny_llama

SMALL = ["--lengths", "512,1K", "--steps", "8"]
HIP = ["--hip-config", '{"sink": 64, "window": 64, "budget": 256}']


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tuned"), peak=3.0)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(Path(json.__file__).read_text() * 40)
    return file


def tune(model: Path, text: Path, out: Path, *more: str) -> int:
    given = ["tune", str(model), "--data", str(text), "--out", str(out), *SMALL, *HIP]
    return run([*given, *(more or ("--trials", "20"))])


@pytest.mark.slow
def test_it_writes_configurations_that_a_server_takes(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # a user's own file stays, one of an earlier search does not
    mine, old = (tmp_path / name for name in ("config-mine.json", "config-99.json"))
    for file in (mine, old):
        file.write_text("{}")
    assert tune(model, text, tmp_path) == 0
    report = json.loads((tmp_path / tuning.REPORT).read_text())
    found = report["configurations"]
    assert len(found) >= 2
    assert mine.exists()
    assert not old.exists()
    for one in found:
        config = HipConfig.load(str(tmp_path / one["file"]))
        assert config.budget == 256
        assert 0 < one["share_read"] <= 1
    # by what they read at the long length; on unseen text the same, but for rounding
    shares = [one["share_read"] for one in found]
    assert shares == sorted(shares)
    assert [one["preset"] for one in report["presets"]] == ["balanced", "quality", "paper"]
    assert (tmp_path / tuning.PICTURE).read_bytes().startswith(b"\x89PNG")
    said = " ".join(capsys.readouterr().out.split())
    # whatever is not dense comes nearer than the published search, and reads less
    assert "than paper, config-" in said


def lines(folder: Path) -> int:
    """What was judged there."""
    return sum(len(file.read_text().splitlines()) for file in folder.glob("*.jsonl"))


@pytest.mark.slow
def test_a_search_that_was_ended_goes_on(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tune(model, text, tmp_path / "whole") == 0
    assert tune(model, text, tmp_path / "parts", "--trials", "8") == 0
    before = lines(tmp_path / "parts")
    judged: list[object] = []
    judge = tuning.Judge.__call__

    def counted(self: tuning.Judge, config: HipConfig) -> tuple[float, float]:
        judged.append(config)
        return judge(self, config)

    monkeypatch.setattr(tuning.Judge, "__call__", counted)
    assert tune(model, text, tmp_path / "parts") == 0
    for name in (tuning.TRIALS, tuning.REPORT):
        assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert lines(tmp_path / "parts") == before + len(judged)
    assert len((tmp_path / "parts" / tuning.TRIALS).read_text().splitlines()) == 20
    judged.clear()
    assert tune(model, text, tmp_path / "parts") == 0
    assert judged == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lengths", "512,1K,2K"], "give one or two lengths"),
        (["--lengths", "8"], "each more than twice --steps"),
        # before a search that would end with it: there is enough to search on
        (["--lengths", "512,16K"], "give more text, or shorter documents"),
        (["--lengths", "512,128K"], "positions, and a document of 131,072 tokens takes more"),
        (["--hip-config", '{"budget": 1024}'], "pruning begins at"),
        (["--hip-config", '{"preset": "dense"}'], "prunes nothing"),
        (["--hip-config", '{"budgt": 1}'], "did you mean budget?"),
        (["--data", "/absent.txt"], "the document /absent.txt cannot be read"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    said: str,
) -> None:
    assert tune(model, text, tmp_path, *more) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line


@pytest.mark.slow
def test_another_search_in_the_same_folder_is_refused(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(model, text, tmp_path, "--trials", "2") == 0
    capsys.readouterr()
    assert tune(model, text, tmp_path, "--seed", "1") == 2
    assert (
        "was begun with seed=0, and this is seed=1; give another --out" in capsys.readouterr().err
    )


def test_a_directory_without_a_model_is_one_line(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(tmp_path, text, tmp_path / "out") == 2
    assert "has no model to load" in capsys.readouterr().err


def test_half_a_model_is_one_line(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = tmp_path / "half"
    shutil.copytree(model, half)
    weights = half / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert tune(half, text, tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "has no model to load" in line


@pytest.mark.slow
def test_a_model_that_was_trained_again_is_another_search(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = tmp_path / "model"
    shutil.copytree(model, ours)
    assert tune(ours, text, tmp_path / "out", "--trials", "2") == 0
    capsys.readouterr()
    weights = ours / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4096] + bytes(4096))
    assert tune(ours, text, tmp_path / "out", "--trials", "2") == 2
    assert "was begun with fingerprint=" in capsys.readouterr().err
