"""Pages on disk come back as they were, or not at all; a disk that fails stops nothing."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hip_kernels.layout import PAGE_SIZE

from hip_sglang.kv.disk_place import Place, changed, kept_in
from hip_sglang.kv.disk_tier import DiskTier
from hip_sglang.kv.page_files import PageFiles
from hip_sglang.kv.page_record import HEADER_BYTES, BrokenRecordError, PageRecords, verify
from tests.attention.served import POOL, Served

HIP = {"dense_threshold": 0, "window": 64, "budget": 128}
OFFLOAD = {**HIP, "offload": {"host_gib": 1, "device_tokens": 1024}}
MANIFEST = {"model": "one", "tp_size": 1}


def key(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def wait_for(tier: DiskTier) -> bool:
    """Whether what was offered first is written."""
    while not tier.num_completed_offloads():
        time.sleep(0.001)
    return tier.pop_completed_offload()


class Kept:
    """A rank's pool with a prompt in its first row, and a tier at ``path``."""

    def __init__(self, path: Path, pages: int = 12, most_bytes: int = 1 << 30) -> None:
        self.rig, self.current = Served(OFFLOAD), True
        self.rig.prompt(0, pages * PAGE_SIZE)
        self.slots = self.rig.table[0, : pages * PAGE_SIZE].long()
        self.keys = [key(number) for number in range(pages)]
        self.records = PageRecords(self.rig.backend)
        self.files = PageFiles(Place.take(path, MANIFEST, 0), most_bytes)
        self.tier = DiskTier(self.records, self.files, POOL, lambda: self.current)

    def write(self) -> bool:
        """Whether all of its keys were written."""
        slots = self.slots[: len(self.keys) * PAGE_SIZE]
        assert self.tier.offload([SimpleNamespace(device_indices=slots, keys=self.keys)])
        return wait_for(self.tier)

    def found(self) -> int:
        return len(self.tier.lookup("", [SimpleNamespace(keys=self.keys)]))

    def image(self, slots: torch.Tensor) -> list[torch.Tensor]:
        """All that is known of these slots' pages."""
        pages = slots[::PAGE_SIZE] // PAGE_SIZE
        pool, backend = self.rig.runner.token_to_kv_pool, self.rig.backend
        held = [host.rows[pages] for host in pool.hosts]
        for layer in backend.layers:
            taken = backend.summaries.pages_of(layer).take(pages)
            held += [tensor.clone() for tensor in taken.tensors]
        return held

    def elsewhere(self) -> torch.Tensor:
        """Slots of pages that nobody has."""
        pages = torch.tensor(self.rig.pages[: len(self.keys)])
        return (pages[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()

    def file(self, number: int) -> Path:
        (found,) = self.files.place.path.glob(f"{self.keys[number]}*")
        return found

    def close(self) -> None:
        self.tier.close()
        self.files.place.release()


@pytest.fixture
def kept(tmp_path: Path):
    made = Kept(tmp_path)
    yield made
    made.close()


def test_pages_come_back_bit_for_bit_and_with_their_summaries(kept: Kept) -> None:
    assert kept.write()
    slots = kept.elsewhere()
    assert kept.tier.read(slots, kept.keys)
    for was, found in zip(kept.image(kept.slots), kept.image(slots), strict=True):
        assert was.any()
        assert torch.equal(was, found)


def test_the_device_drops_what_it_held_of_a_page_before(kept: Kept) -> None:
    kept.write()
    pages = kept.slots[::PAGE_SIZE] // PAGE_SIZE
    caches = kept.rig.runner.token_to_kv_pool.caches
    assert any((cache.slot[:, pages] >= 0).any() for cache in caches)
    assert kept.tier.read(kept.slots, kept.keys)
    assert not any((cache.slot[:, pages] >= 0).any() for cache in caches)


def test_another_server_finds_what_the_first_one_wrote(tmp_path: Path) -> None:
    first = Kept(tmp_path)
    first.write()
    image = first.image(first.slots)
    first.close()
    second = Kept(tmp_path)
    assert second.found() == 12
    slots = second.elsewhere()
    assert second.tier.read(slots, second.keys)
    assert all(map(torch.equal, image, second.image(slots)))
    second.close()


def test_the_longest_prefix_without_a_gap_is_found(kept: Kept) -> None:
    kept.write()
    assert kept.found() == 12
    kept.files.drop(kept.keys[7])
    assert kept.found() == 7


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


HARM: dict[str, Any] = {
    "a bit of the keys": lambda file: flip(file, 5000),
    "the last bit": lambda file: flip(file, -1),
    "a bit of the parent": lambda file: flip(file, 60),
    "the magic": lambda file: flip(file, 0),
    "cut short": lambda file: os.truncate(file, 4000),
    "empty": lambda file: os.truncate(file, 0),
    "deleted": Path.unlink,
    "another page": lambda file: file.write_bytes(
        max(file.parent.glob("*.bin"), key=lambda one: one != file).read_bytes()
    ),
}


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM)
def test_a_page_that_was_harmed_is_never_used_and_computed_again(kept: Kept, harm: Any) -> None:
    kept.write()
    harm(kept.file(5))
    assert not kept.tier.read(kept.elsewhere(), kept.keys)
    # what comes before it is good
    assert kept.found() == 5
    assert kept.tier.read(kept.elsewhere()[: 5 * PAGE_SIZE], kept.keys[:5])
    # and it may be written again
    assert kept.write()
    assert kept.tier.read(kept.elsewhere(), kept.keys)


def test_a_disk_that_refuses_pages_is_left_alone_for_a_while_and_said_once(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kept.files, "set", lambda *_: False)
    assert not kept.write()
    monkeypatch.undo()
    assert not kept.write()
    monkeypatch.setattr(kept.tier, "_pause_ends", 0.0)
    assert kept.write()
    said = [record for record in caplog.records if "cannot be written" in record.message]
    assert len(said) == 1


def test_the_disk_is_bounded_and_prefixes_are_dropped_from_their_end(tmp_path: Path) -> None:
    size = Kept(tmp_path / "probe").records.nbytes
    kept = Kept(tmp_path / "small", most_bytes=16 * size)
    first, second = kept.keys[:6], kept.keys[6:]
    for kept.keys in (first, second):
        assert kept.write()
    assert kept.tier.read(kept.elsewhere()[: 6 * PAGE_SIZE], first)
    kept.close()
    kept = Kept(tmp_path / "small", most_bytes=16 * size)
    kept.keys = [key(100 + number) for number in range(7)]
    assert kept.write()
    used = sum(file.stat().st_size for file in kept.files.place.path.glob("*.bin"))
    assert used == kept.files.nbytes <= 16 * size
    assert kept.found() == 7
    # the one that was read last is whole, of the other its start is left
    kept.keys = first
    assert kept.found() == 6
    kept.keys = second
    assert 0 < kept.found() < 6
    assert len(list(kept.files.place.path.glob("*.bin"))) == 13 + kept.found()
    kept.close()


def test_where_a_quarter_of_the_pool_waits_the_end_of_a_prefix_is_let_go(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, write = threading.Event(), kept.tier._write
    monkeypatch.setattr(kept.tier, "_write", lambda *page: slow.wait(10) and write(*page))
    keys = [key(number) for number in range(POOL // 4 + 2)]
    slots = torch.arange(len(keys) * PAGE_SIZE)

    def offer(first: int, end: int) -> None:
        kept.tier.before = keys[:first]
        some = slots[first * PAGE_SIZE : end * PAGE_SIZE]
        kept.tier.offload([SimpleNamespace(device_indices=some, keys=keys[first:end])])

    # one chunk of a prompt after the other; the last one is too much
    chunks = [(0, 1), (1, POOL // 4), (POOL // 4, POOL // 4 + 1)]
    for chunk in chunks:
        offer(*chunk)
    slow.set()
    assert [wait_for(kept.tier) for _ in chunks] == [True, True, False]
    kept.keys = keys
    assert kept.found() == POOL // 4
    # whoever finds it next offers it again; and a chunk alone may be of any size
    offer(*chunks[-1])
    assert wait_for(kept.tier)
    kept.keys = keys = [key(1000 + number) for number in range(POOL // 4 + 2)]
    offer(0, len(keys))
    assert wait_for(kept.tier)
    assert kept.found() == len(keys)


def test_pages_of_a_model_that_was_changed_are_used_no_more(kept: Kept) -> None:
    kept.write()
    kept.tier.reset()
    assert kept.found() == 12
    # SGLang flushes its cache when weights are updated
    kept.current = False
    kept.tier.reset()
    assert kept.found() == 0
    assert not kept.write()


def test_two_servers_have_a_place_each_and_the_next_one_finds_the_first(tmp_path: Path) -> None:
    first, second = (Place.take(tmp_path, MANIFEST, 0) for _ in range(2))
    assert first.path != second.path
    first.release()
    assert Place.take(tmp_path, MANIFEST, 0).path == first.path


def test_another_model_s_pages_are_set_aside(tmp_path: Path) -> None:
    first = Place.take(tmp_path, MANIFEST, 0)
    other = Place.take(tmp_path, {**MANIFEST, "tp_size": 2}, 0)
    assert first.path.parent != other.path.parent
    kept = kept_in(tmp_path)
    assert len(kept) == 2
    assert changed(kept[0].manifest, kept[1].manifest) == ["tp_size"]


WRITER = """
import sys
from pathlib import Path
from tests.kv.test_disk_tier import Kept, key
kept = Kept(Path(sys.argv[1]))
print("ready", flush=True)
for round in range(1000):
    kept.keys = [key(100 * round + number) for number in range(12)]
    kept.write()
"""


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, pytest.param(50, marks=pytest.mark.soak)])
def test_a_server_killed_as_it_writes_leaves_no_page_that_is_not_whole(
    tmp_path: Path, times: int
) -> None:
    choose = random.Random(times)
    for _ in range(times):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(choose.random() * 0.2)
            writer.send_signal(signal.SIGKILL)
        (place,) = (home for kept in kept_in(tmp_path) for home in kept.places)
        found = list(place.glob("*.bin"))
        for file in found:
            assert verify(memoryview(file.read_bytes())).key == file.name[:64]
    assert found
    # what was being written is cleared away by the next one
    Kept(tmp_path).close()
    assert not list(place.glob(".*.tmp"))


def test_bytes_that_are_no_page_are_refused() -> None:
    for data in (b"", bytes(HEADER_BYTES), b"hip-kv 1"):
        with pytest.raises(BrokenRecordError):
            verify(memoryview(data))
