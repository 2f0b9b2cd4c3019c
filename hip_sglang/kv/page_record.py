"""A page as bytes: all that a rank needs to go on from it, and how to tell that none is amiss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct
from typing import TYPE_CHECKING

import numpy as np
import torch
import xxhash
from hip_kernels.layout import PAGE_SIZE
from torch import Tensor

if TYPE_CHECKING:
    from hip_sglang.attention.backend import HipAttentionBackend

MAGIC = b"hip-kv 1"
_FIELDS = Struct("<8s16s32s32s")
HEADER_BYTES = 128  # more than the fields take: numbers behind it are aligned


class BrokenRecordError(ValueError):
    """Bytes that are not the page that they should be."""


@dataclass(frozen=True)
class Header:
    """Which page a record holds."""

    key: str  # SGLang's hash of all tokens up to its end, in hexadecimal
    parent: str | None  # the key of the page before it

    def write(self, record: Tensor) -> None:
        """Into a record [bytes] whose other bytes are complete: the checksum covers them."""
        parent = bytes.fromhex(self.parent) if self.parent else bytes(32)
        fields = _FIELDS.pack(MAGIC, bytes(16), bytes.fromhex(self.key), parent)
        data = record.numpy()
        data[:HEADER_BYTES] = bytearray(fields.ljust(HEADER_BYTES, b"\0"))
        data[8:24] = bytearray(_checksum(data.data))

    @classmethod
    def read(cls, data: bytes | memoryview) -> Header:
        """From the first bytes of a record. Raises ``BrokenRecordError``."""
        if len(data) < _FIELDS.size:
            raise BrokenRecordError("it is too short")
        magic, _, key, parent = _FIELDS.unpack_from(data)
        if magic != MAGIC:
            raise BrokenRecordError("it was not written by this version")
        return cls(key.hex(), parent.hex() if any(parent) else None)


def verify(data: memoryview) -> Header:
    """The header of a whole record, which is as it was written. Raises ``BrokenRecordError``."""
    header = Header.read(data)
    if len(data) < HEADER_BYTES or _checksum(data) != bytes(data[8:24]):
        raise BrokenRecordError("its checksum is wrong")
    return header


def _checksum(data: memoryview) -> bytes:
    digest = xxhash.xxh3_128(bytes(data[:8]))
    digest.update(data[24:])
    return digest.digest()


class PageRecords:
    """The pages of one rank's pool as records: the KV of every layer, and the pages' summaries.

    With the summaries a page can be chosen without its keys being read again.
    """

    def __init__(self, backend: HipAttentionBackend) -> None:
        self._pool = backend.token_to_kv_pool
        self._hosts = [host.rows for host in self._pool.hosts]
        self._summaries = [
            tensor.transpose(0, -2)  # the pages come first
            for layer, plan in backend.layers.items()
            if plan.prunes
            for tensor in backend.summaries.pages_of(layer).tensors
        ]
        self._nodes = backend.nodes
        sizes = [tensor[0].nbytes for tensor in (*self._hosts, *self._summaries)]
        self.nbytes = HEADER_BYTES + sum(sizes)

    def pack(self, page: int, header: Header, record: Tensor) -> None:
        """The physical page into a record [nbytes], in host memory."""
        for kept, live in self._pairs(record, page):
            _copy(live, kept)
        header.write(record)

    def unpack(self, record: Tensor, page: int) -> None:
        """A record that was verified into a physical page that nobody reads yet."""
        for kept, live in self._pairs(record, page):
            _copy(kept, live)

    def settle(self, pages: Tensor) -> None:
        """Pages [C] were unpacked: copies of them, and nodes that end at them, are of before."""
        self._pool.drop(pages)
        if self._nodes is not None:
            self._nodes.forget(pages)

    def _pairs(self, record: Tensor, page: int) -> Sequence[tuple[Tensor, Tensor]]:
        start, pairs = HEADER_BYTES, []
        for tensor in (*self._hosts, *self._summaries):
            live = tensor[page]
            kept = record[start : start + live.nbytes].view(live.dtype).view(live.shape)
            pairs.append((kept, live))
            start += live.nbytes
        return pairs


def _copy(source: Tensor, target: Tensor) -> None:
    if source.is_cpu and target.is_cpu:
        # torch would take threads from the model, which is computing meanwhile
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[source.itemsize]
        np.copyto(target.view(bits).numpy(), source.view(bits).numpy())
    else:
        target.copy_(source)


def pages_of_slots(slots: Tensor) -> list[int]:
    """Whole pages of slots [P * 64] -> their physical numbers [P]."""
    return torch.div(slots[::PAGE_SIZE], PAGE_SIZE, rounding_mode="floor").tolist()
