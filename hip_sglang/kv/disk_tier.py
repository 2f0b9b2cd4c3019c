"""Prefixes on disk: pages are written behind the requests that made them, and read back whole.

SGLang's tree does what is common to all such stores: it finds pages by the hash of their tokens,
holds what is being written, and lets ranks agree (``UnifiedCacheLinker``). This is the store.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING

import torch
from hip_kernels.layout import PAGE_SIZE
from sglang.srt.mem_cache.hicache_storage import PoolTransfer
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker

from hip_sglang.kv.page_record import (
    BrokenRecordError,
    Header,
    PageRecords,
    pages_of_slots,
    verify,
)

if TYPE_CHECKING:
    from hip_sglang.kv.page_files import PageFiles
    from hip_sglang.telemetry import DiskTelemetry

logger = logging.getLogger(__name__)

READERS = 4
# a disk that refused a page is asked again after so long
PAUSE_SECONDS = 60.0
# pages that wait to be written, as a share of the pool: more that come are let go unwritten
MOST_WAITING = 1 / 4


@dataclass(frozen=True)
class _Task:
    """Pages to write, which follow each other."""

    pages: list[int]  # physical
    headers: list[Header]
    prefix: list[str]  # the keys of all pages up to the last
    fits: bool  # elsewise they are let go
    on_gpu: bool  # where what fills them may still be under way


class DiskTier(UnifiedCacheLinker):  # type: ignore[misc]
    """One rank's pages on disk. Where ``files`` is None nothing is found, and nothing kept."""

    layer_done_counter = None  # what is read is there before anybody asks for it

    def __init__(
        self,
        records: PageRecords,
        files: PageFiles | None,
        pages: int,
        is_current: Callable[[], bool],
        telemetry: DiskTelemetry | None = None,
    ) -> None:
        """pages: of the pool; is_current: whether the model is still that of the files."""
        # keys of all pages before those that are asked for, or offered, next
        self.before: Sequence[str] = ()
        self.records, self.files, self.telemetry = records, files, telemetry
        self._is_current = is_current
        self._most_waiting = int(pages * MOST_WAITING)
        self._waiting = 0
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._results: SimpleQueue[bool] = SimpleQueue()
        self._idle = threading.Condition()
        self._pause_ends = 0.0
        self._said: set[str] = set()
        self._buffers = threading.local()
        self._readers = ThreadPoolExecutor(READERS, "hip-disk-read")
        self._writer = threading.Thread(target=self._write_behind, name="hip-disk-write")
        self._writer.daemon = True
        self._writer.start()

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        keys = transfers[0].keys
        found = 0
        while self.files is not None and found < len(keys) and self.files.exists(keys[found]):
            found += 1
        return list(range(1, found + 1))

    def read(self, slots: torch.Tensor, keys: Sequence[str]) -> bool:
        """The pages of some keys into slots [P * 64]; False if one of them cannot be used."""
        if slots.is_cuda:
            # a pass under way may still write to a page that was given back
            torch.cuda.synchronize()
        pages = pages_of_slots(slots)
        start = time.monotonic()
        done = all(list(self._readers.map(self._read, keys, pages)))
        if done:
            self.records.settle(slots[::PAGE_SIZE] // PAGE_SIZE)
            assert self.files is not None
            self._readers.submit(self.files.touch, [*self.before, *keys])
            self._count("read", len(keys), time.monotonic() - start)
        return done

    def offload(self, transfers: list[PoolTransfer]) -> bool:
        """Write pages behind; they must stay as they are until it is done.

        All are taken, for ranks must agree; what is not written in the end is said by its result,
        and is offered again by the next request that finds it.
        """
        slots, keys, before = transfers[0].device_indices, transfers[0].keys, self.before
        parents = [before[-1] if before else None, *keys]
        headers = [Header(key, parent) for key, parent in zip(keys, parents, strict=False)]
        with self._idle:
            # what waits cannot be evicted. the beginning of a prefix is of use without its end
            fits = not self._waiting or self._waiting + len(keys) <= self._most_waiting
            self._waiting += len(keys) * fits
        prefix = [*before, *keys]
        self._tasks.put(_Task(pages_of_slots(slots), headers, prefix, fits, slots.is_cuda))
        return True

    def num_completed_offloads(self) -> int:
        return self._results.qsize()

    def pop_completed_offload(self) -> bool:
        return self._results.get_nowait()

    # pages are read before the tree learns of them, so that none of a broken file is in it

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        raise NotImplementedError("pages are read before the tree learns of them")

    def start_layer_wise_loading(self) -> int:
        return -1

    def cancel_queued_load(self, rid: str) -> bool:
        return False

    def num_completed_loads(self) -> int:
        return 0

    def pop_completed_load(self) -> list[str]:
        return []

    def reset(self) -> None:
        """Wait until all was written; what is on disk stays, unless the model is another now."""
        with self._idle:
            self._idle.wait_for(lambda: self._waiting == 0)
        while not self._results.empty():
            self._results.get_nowait()
        if self.files is not None and not self._is_current():
            self.files = None
            logger.warning(
                "hip_attention disk: the model's weights changed, and pages on disk are not of "
                "them; the server goes on without, until it is started again"
            )

    def close(self) -> None:
        self.reset()
        self._tasks.put(None)
        self._writer.join()
        self._readers.shutdown()

    def _read(self, key: str, page: int) -> bool:
        assert self.files is not None
        record = self._buffer()
        try:
            if self.files.get(key, record) is None:
                raise BrokenRecordError("it is gone")
            if verify(record.numpy().data).key != key:
                raise BrokenRecordError("it holds another page")
        except (OSError, BrokenRecordError) as error:
            self.files.drop(key)
            self._count("broken", 1)
            self._say_once("read", f"a page on disk cannot be used and is computed again: {error}")
            return False
        self.records.unpack(record, page)
        return True

    def _write_behind(self) -> None:
        while (task := self._tasks.get()) is not None:
            written = 0
            try:
                if task.on_gpu:
                    # a chunk of a prompt is offered when its pass is launched
                    torch.cuda.synchronize()
                for page, header in zip(task.pages, task.headers, strict=True):
                    if not task.fits or not self._write(page, header):
                        break
                    written += 1
                if self.files is not None:
                    self.files.touch(task.prefix)
            except Exception:
                logger.exception("hip_attention disk: pages could not be written")
            self._count("skipped", len(task.pages) - written)
            self._results.put(written == len(task.pages))
            with self._idle:
                self._waiting -= len(task.pages) * task.fits
                self._idle.notify_all()

    def _write(self, page: int, header: Header) -> bool:
        """Whether it is on disk now."""
        if self.files is None or time.monotonic() < self._pause_ends:
            return False
        if self.files.exists(header.key):
            return True
        start = time.monotonic()
        record = self._buffer()
        self.records.pack(page, header, record)
        if not self.files.set(header.key, record):
            self._pause_ends = time.monotonic() + PAUSE_SECONDS
            self._say_once("write", "pages cannot be written to disk; the server goes on without")
            return False
        self._count("written", 1, time.monotonic() - start)
        return True

    def _buffer(self) -> torch.Tensor:
        """Of this thread."""
        if not hasattr(self._buffers, "record"):
            self._buffers.record = torch.zeros(self.records.nbytes, dtype=torch.uint8)
        record: torch.Tensor = self._buffers.record
        return record

    def _count(self, what: str, pages: int, seconds: float = 0.0) -> None:
        if self.telemetry is not None:
            used = 0 if self.files is None else self.files.nbytes
            self.telemetry.observe(what, pages, pages * self.records.nbytes, seconds, used)

    def _say_once(self, what: str, message: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning("hip_attention disk: %s (said once; see the metrics)", message)
