"""Counters of a rank on another machine, in the scrape of the server: real ones."""

from __future__ import annotations

import subprocess
import sys
from multiprocessing import AuthenticationError

import pytest
from hip_cluster.scrape import Shelves
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

RANK = """
import sys
from hip_cluster.scrape import Shelf
shelf = Shelf("127.0.0.1", "the secret")
print(*shelf.address, flush=True)
from prometheus_client import Counter, Gauge
steps = Counter("steps", "Steps", ["rank"])
queue = Gauge("queue", "Requests", ["rank"], multiprocess_mode="mostrecent")
for line in sys.stdin:
    steps.labels(line.strip()).inc()
    queue.labels(line.strip()).set(7)
    print("done", flush=True)
"""


@pytest.fixture
def rank():
    line = [sys.executable, "-c", RANK]
    pipe = subprocess.PIPE
    process = subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True)
    host, port = process.stdout.readline().split()
    process.address = (host, int(port))
    yield process
    process.kill()
    process.wait()


def step(process, name):
    process.stdin.write(name + "\n")
    process.stdin.flush()
    assert process.stdout.readline() == "done\n"


def scraped(folder):
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(folder))
    return generate_latest(registry).decode()


def test_a_scrape_has_what_was_counted_elsewhere_until_now(rank, tmp_path, monkeypatch):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    shelves = Shelves([(1, rank.address)], "the secret")
    for count in (1, 2):
        step(rank, "1")
        shelves.fetch()
        assert f'steps_total{{rank="1"}} {count}.0' in scraped(tmp_path)
    assert 'queue{rank="1"} 7.0' in scraped(tmp_path)


def test_a_rank_that_died_keeps_its_last_numbers_and_breaks_no_scrape(rank, tmp_path, monkeypatch):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    shelves = Shelves([(1, rank.address)], "the secret")
    step(rank, "1")
    shelves.fetch()
    rank.kill()
    rank.wait()
    for _ in range(2):
        shelves.fetch()
    assert 'steps_total{rank="1"} 1.0' in scraped(tmp_path)


def test_a_stranger_gets_nothing_and_does_no_harm(rank, tmp_path, monkeypatch):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    with pytest.raises(AuthenticationError):
        Shelves([(1, rank.address)], "guessed")
    step(rank, "1")
    Shelves([(1, rank.address)], "the secret").fetch()
    assert 'steps_total{rank="1"} 1.0' in scraped(tmp_path)
