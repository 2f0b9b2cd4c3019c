"""The script of the download Job and of the pods that wait for it."""

import importlib.util
import json
import os
import subprocess
import sys
import time

import pytest

from tests.helm import chart
from tests.helm.hub import hub

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


FILES = {
    "config.json": b'{"layers": 2}',
    "weights.safetensors": b"w" * 5000,
    "notes.md": b"not asked for",
}


def environment_for(path, **more):
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(path),
        "HIP_MODEL_PATH": str(path / "models" / "model"),
        "HIP_MODEL_REPOSITORY": WANTED["repository"],
        "HIP_MODEL_REVISION": WANTED["revision"],
        "HIP_MODEL_PATTERNS": '["*.json", "*.safetensors"]',
        **more,
    }


def fetch(path, files=FILES, says=FILES):
    """Run the Job's command against a hub that has ``files``, with the checksums of ``says``."""
    with hub(files, says) as url:
        return subprocess.run(
            [sys.executable, str(SCRIPT), "fetch"],
            env=environment_for(path, HF_ENDPOINT=url),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


def test_the_hub_s_own_client_fetches_what_was_asked_for(model, tmp_path):
    result = fetch(tmp_path)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "models" / "model"
    assert (folder / "weights.safetensors").read_bytes() == FILES["weights.safetensors"]
    assert not (folder / "notes.md").exists()
    assert model.missing(folder, WANTED) is None


def test_a_model_that_is_there_is_not_fetched_again(tmp_path):
    assert fetch(tmp_path).returncode == 0
    # a hub that has nothing: it is not asked
    again = fetch(tmp_path, files={}, says={})
    assert again.returncode == 0
    assert "downloading" not in again.stdout


@pytest.mark.parametrize("name", ["weights.safetensors", "config.json"])
def test_wrong_content_is_removed_and_refused(model, tmp_path, name):
    broken = FILES[name][:-1] + b"?"
    result = fetch(tmp_path, files={**FILES, name: broken})
    assert result.returncode != 0
    assert "has the checksum" in result.stderr
    folder = tmp_path / "models" / "model"
    assert not (folder / name).exists()
    assert model.missing(folder, WANTED) is not None


def test_a_pod_waits_until_the_model_is_there(complete):
    marker = complete / ".hip-sglang-model.json"
    text = marker.read_text()
    marker.unlink()
    environment = environment_for(complete, HIP_MODEL_PATH=str(complete))
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
