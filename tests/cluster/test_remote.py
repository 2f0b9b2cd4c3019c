"""Batches whose questions and answers are in an object store: a real S3 API, and killed drivers."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter

import fsspec
import pytest
import yaml
from hip_cluster.ports import require_free

from tests.cluster.batches import QUESTIONS, Server, kill_at_points, run, write_questions
from tests.cluster.conftest import document

BUCKET = "s3://bucket"


@pytest.fixture
def server():
    return Server()


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """A store on a port of this machine, with a bucket and nothing in it."""
    # a second, which runs of other tests should not pay
    from moto.server import ThreadedMotoServer

    patch = pytest.MonkeyPatch()
    store = ThreadedMotoServer(port=0, verbose=False)
    store.start()
    host, port = store.get_host_and_port()
    patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.setenv(name, "testing")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    system = fsspec.filesystem("s3", use_listings_cache=False)
    system.mkdir("bucket")
    yield system
    store.stop()
    patch.undo()


def put_questions(s3, tmp_path, name, **how):
    s3.put(str(write_questions(tmp_path / "in.jsonl", **how)), f"{BUCKET}/{name}.jsonl")
    return f"{BUCKET}/{name}.jsonl", f"{BUCKET}/{name}"


def answers_in(s3, folder):
    """What the parts hold that the manifest names."""
    manifest = json.loads(s3.cat(f"{folder}/manifest.json"))
    parts = [s3.cat(f"{folder}/{part['name']}").splitlines() for part in manifest["parts"]]
    assert [part["answers"] for part in manifest["parts"]] == [len(part) for part in parts]
    return Counter(json.loads(line)["id"] for part in parts for line in part)


@pytest.mark.slow
def test_questions_and_answers_are_in_an_object_store(server, s3, tmp_path):
    questions, folder = put_questions(s3, tmp_path, "whole", count=70)
    done = run(server, questions, folder)
    assert done.returncode == 0, done.stderr
    assert answers_in(s3, folder) == Counter(f"q{n}" for n in range(70))
    asked = len(server.asked)
    assert run(server, questions, folder).returncode == 0
    assert len(server.asked) == asked


@pytest.mark.soak
def test_a_driver_killed_at_ten_points_has_each_answer_once_in_the_store(server, s3, tmp_path):
    questions, folder = put_questions(s3, tmp_path, "killed")
    server.pause = 0.05
    kill_at_points(random.Random(2), server, questions, folder, longest=1.5)
    done = run(server, questions, folder)
    assert done.returncode == 0, done.stderr
    assert answers_in(s3, folder) == Counter(f"q{n}" for n in range(QUESTIONS))


@pytest.mark.soak
@pytest.mark.parametrize(
    ("questions", "folder", "variables", "said"),
    [
        (f"{BUCKET}/nothing.jsonl", f"{BUCKET}/out", {}, "name a file of JSON lines"),
        (None, "s4://bucket/out", {}, "Protocol not known: s4"),
        (None, f"{BUCKET}/out", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "127.0.0.1:9"),
    ],
)
def test_a_store_that_cannot_be_used_is_told_in_one_line(
    server, s3, tmp_path, monkeypatch, questions, folder, variables, said
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    given = questions or write_questions(tmp_path / "in.jsonl", count=2)
    done = run(server, given, folder)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not server.asked


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_batch_runs_an_endpoint_for_itself_and_goes_on_after_a_kill(
    s3, tiny_llama, tmp_path, monkeypatch
):
    """The driver and its endpoint both: killed when a first part is in the store."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    content, file = document(tiny_llama, name="batch"), tmp_path / "endpoint.yaml"
    file.write_text(yaml.safe_dump(content))
    short = {"max_new_tokens": 4, "ignore_eos": True}
    questions, folder = put_questions(s3, tmp_path, "own", words=20, sampling_params=short)
    line = [sys.executable, "-m", "hip_cluster.batch", "--file", str(file)]
    line += ["--input", questions, "--output", folder, "--concurrency", "4"]
    with (tmp_path / "log.txt").open("wb") as log:
        first = subprocess.Popen(line, stdout=log, stderr=log)
        while not s3.exists(f"{folder}/manifest.json"):
            assert first.poll() is None, (tmp_path / "log.txt").read_text()
            time.sleep(0.05)
        first.kill()
        first.wait()
    kept = answers_in(s3, folder)
    assert 0 < len(kept) < QUESTIONS
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert answers_in(s3, folder) == Counter(f"q{n}" for n in range(QUESTIONS))
    require_free("127.0.0.1", content["server"]["port"], "server.port")
