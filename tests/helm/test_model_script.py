"""The script of the download Job and of the pods that wait for it."""

import importlib.util
import json
import os
import subprocess
import sys
import time

import pytest

from tests.helm import chart

SCRIPT = chart.CHART / "files" / "model.py"
WANTED = {"repository": "owner/model", "revision": "a" * 40}


@pytest.fixture(scope="module")
def model():
    spec = importlib.util.spec_from_file_location("chart_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def complete(tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(b"12345")
    marker = WANTED | {"files": {"weights.safetensors": 5}}
    (tmp_path / ".hip-sglang-model.json").write_text(json.dumps(marker))
    return tmp_path


def test_a_complete_model_is_recognised(model, complete):
    assert model.missing(complete, WANTED) is None


def test_a_folder_without_marker_is_incomplete(model, tmp_path):
    assert "no complete model" in model.missing(tmp_path, WANTED)


def test_another_commit_is_another_model(model, complete):
    assert "owner/model at aaaa" in model.missing(complete, WANTED | {"revision": "b" * 40})


def test_a_file_that_was_cut_off_is_noticed(model, complete):
    (complete / "weights.safetensors").write_bytes(b"123")
    assert "not as it was downloaded" in model.missing(complete, WANTED)


def test_wrong_content_is_removed_and_refused(model, tmp_path):
    class Lfs:
        sha256 = "0" * 64

    class Entry:
        lfs = Lfs()

    file = tmp_path / "weights"
    file.write_bytes(b"other bytes")
    with pytest.raises(SystemExit, match="has the checksum"):
        model.compare(file, Entry())
    assert not file.exists()


def test_small_files_are_compared_as_git_does(model, tmp_path):
    class Entry:
        lfs = None
        # git hash-object of "hello\n"
        blob_id = "ce013625030ba8dba906f756967f9e9ca394464a"

    file = tmp_path / "config.json"
    file.write_bytes(b"hello\n")
    model.compare(file, Entry())
    assert file.exists()


def test_a_pod_waits_until_the_model_is_there(complete):
    marker = complete / ".hip-sglang-model.json"
    text = marker.read_text()
    marker.unlink()
    environment = {
        **os.environ,
        "HIP_MODEL_PATH": str(complete),
        "HIP_MODEL_REPOSITORY": WANTED["repository"],
        "HIP_MODEL_REVISION": WANTED["revision"],
        "HIP_MODEL_PATTERNS": "[]",
    }
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), "wait"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline().startswith("waiting: ")
        marker.write_text(text)
        began = time.monotonic()
        assert process.wait(60) == 0
        assert time.monotonic() - began < 50
