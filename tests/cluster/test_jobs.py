"""Offline batches against a real HTTP server that answers like SGLang's, killed and resumed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter

import pytest
from hip_cluster.answers import open_answers

from tests.cluster.batches import (
    QUESTIONS,
    Server,
    command,
    ids,
    kill_at_points,
    run,
    write_questions,
)


@pytest.fixture
def server():
    return Server()


def test_every_question_is_answered_once_and_each_document_is_read_first(server, tmp_path):
    questions = write_questions(tmp_path / "in.jsonl")
    done = run(server, questions, tmp_path / "out.jsonl", "--concurrency", "8")
    assert done.returncode == 0, done.stderr
    assert Counter(ids(tmp_path / "out.jsonl")) == Counter(f"q{n}" for n in range(QUESTIONS))
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert all(one["text"] == f"<ion {int(one['id'][1:]):04d}>" for one in answers)
    assert server.early == 0
    assert server.most <= 8


def test_questions_of_one_document_run_together_once_it_was_read(server, tmp_path):
    server.pause = 0.1
    questions = write_questions(tmp_path / "in.jsonl", count=33, documents=1)
    assert run(server, questions, tmp_path / "out.jsonl", "--concurrency", "16").returncode == 0
    assert server.most == 16


@pytest.mark.soak
def test_a_driver_killed_at_ten_points_answers_each_question_once(server, tmp_path):
    questions, output = write_questions(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    server.pause = 0.05
    kill_at_points(random.Random(1), server, questions, output, longest=0.4)
    done = run(server, questions, output)
    assert done.returncode == 0, done.stderr
    assert Counter(ids(output)) == Counter(f"q{n}" for n in range(QUESTIONS))


def test_a_torn_last_line_is_repaired_and_asked_again(server, tmp_path):
    questions, output = write_questions(tmp_path / "in.jsonl", count=5), tmp_path / "out.jsonl"
    output.write_text('{"id": "q0", "text": "kept"}\n{"id": "q1", "te')
    assert run(server, questions, output).returncode == 0
    assert sorted(ids(output)) == ["q0", "q1", "q2", "q3", "q4"]
    assert json.loads(output.read_text().splitlines()[0])["text"] == "kept"
    assert len(server.asked) == 4


def test_failures_stand_in_a_file_of_their_own_and_are_not_asked_again(server, tmp_path):
    questions, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    questions.write_text('{"prompt": "impossible"}\n{"prompt": "easy"}\n')
    for _ in range(2):
        assert run(server, questions, output).returncode == 0
    assert ids(output) == ["2"]
    assert ids(tmp_path / "out.failures.jsonl") == ["1"]
    assert len(server.asked) == 2


def test_a_server_that_is_away_for_a_moment_is_asked_again(server, tmp_path):
    server.away = 2
    questions = write_questions(tmp_path / "in.jsonl", count=3)
    assert run(server, questions, tmp_path / "out.jsonl").returncode == 0
    assert len(ids(tmp_path / "out.jsonl")) == 3


def test_two_drivers_do_not_write_one_file(server, tmp_path):
    server.pause = 3
    questions, output = write_questions(tmp_path / "in.jsonl", count=2), tmp_path / "out.jsonl"
    first = subprocess.Popen(command(server, questions, output), stdout=subprocess.DEVNULL)
    while not server.asked:
        time.sleep(0.05)
    second = run(server, questions, output)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert second.returncode == 2
    assert "another process writes it" in second.stderr
    assert second.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"id": 1', "line 1: not JSON"),
        ('{"text": "x"}', 'line 1: expected an object with a text "prompt"'),
        ('{"prompt": "x", "temperatur": 1}', "line 1: unknown key 'temperatur'"),
        ('{"prompt": "x", "id": 2}\n{"prompt": "y"}', "line 2: id '2' stands twice"),
    ],
)
def test_what_is_no_question_is_told_with_its_line(server, tmp_path, line, said):
    questions = tmp_path / "in.jsonl"
    questions.write_text(line + "\n")
    done = run(server, questions, tmp_path / "out.jsonl")
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not server.asked


def test_a_wrong_key_ends_the_batch_in_one_line(server, tmp_path, monkeypatch):
    monkeypatch.setenv("WRONG", "wrong")
    questions = write_questions(tmp_path / "in.jsonl", count=3)
    done = run(server, questions, tmp_path / "out.jsonl", "--api-key-env", "WRONG")
    assert done.returncode == 2
    assert "the server refused the key" in done.stderr


def test_a_folder_of_parts_counts_what_its_manifest_names(tmp_path):
    folder = f"file://{tmp_path}/answers"
    answers = open_answers(folder, None)
    for number in range(70):
        answers.add({"id": f"q{number}", "text": "x"}, failed=number == 3)
    # killed here: 64 were kept, six were not
    again = open_answers(folder, None)
    assert len(again.known()) == 64
    for number in range(70):
        if f"q{number}" not in again.known():
            again.add({"id": f"q{number}", "text": "y"}, failed=False)
    again.close()
    assert open_answers(folder, None).known() == {f"q{n}" for n in range(70)}
    manifest = json.loads((tmp_path / "answers/manifest.json").read_text())
    kept = [one for part in manifest["parts"] for one in ids(tmp_path / "answers" / part["name"])]
    assert Counter(kept) == Counter(f"q{n}" for n in range(70))
    assert sum(part["answers"] for part in manifest["parts"] if part["failed"]) == 1


def test_a_part_that_no_manifest_names_is_written_over(tmp_path):
    os.makedirs(tmp_path / "answers")
    (tmp_path / "answers/answers-000000.jsonl").write_text('{"id": "lost", "text": "x"}\n')
    answers = open_answers(f"file://{tmp_path}/answers", None)
    assert answers.known() == set()
    answers.add({"id": "q0", "text": "x"}, failed=False)
    answers.close()
    assert ids(tmp_path / "answers/answers-000000.jsonl") == ["q0"]
