"""SGLang's file storage in a directory of ours: bounded, and a broken file can be dropped."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sglang.srt.environ import envs
from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorageConfig

from hip_sglang.kv.disk_place import SUFFIX, Place


class PageFiles(HiCacheFile):  # type: ignore[misc]
    """One file a key. It is complete or not there: SGLang writes elsewhere, and renames."""

    def __init__(self, place: Place, most_bytes: int) -> None:
        """most_bytes: of all files. The place is held as long as this is."""
        self.place, self.most_bytes = place, most_bytes
        # of one rank: its place is its own
        config = HiCacheStorageConfig(
            tp_rank=0,
            tp_size=1,
            pp_rank=0,
            pp_size=1,
            attn_cp_rank=0,
            attn_cp_size=1,
            is_mla_model=False,
            enable_storage_metrics=False,
            is_page_first_layout=False,
            model_name=None,
            extra_config={
                "max_size": most_bytes,
                # the index of files is in memory, and never grows old
                "enable_metadata_cache": True,
                "metadata_ttl": -1.0,
            },
        )
        # a variable of SGLang's would lead elsewhere
        with envs.SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR.override(str(place.path)):
            super().__init__(config)

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return int(self._evictor._total_bytes)

    def touch(self, keys: Sequence[str]) -> None:
        """The pages of one prefix, first to last, are used now: what comes last goes first.

        SGLang's own order would drop a prefix from its start on, and the rest be of no use. Files
        keep it for the next server.
        """
        now = time.time_ns()
        for age, key in reversed(list(enumerate(keys))):
            self._evictor.touch(self._get_suffixed_key(key), str(self._path(key)))
            with suppress(OSError):  # dropped, or never written
                os.utime(self._path(key), ns=(now, now - 1000 * age))

    def drop(self, key: str) -> None:
        """Forget a key, and its file if there is one."""
        name = self._get_suffixed_key(key)
        self.metadata_cache.remove(name)
        self._evictor.abort(name)
        with suppress(OSError):  # the next server will find it again, and that it is broken
            self._path(key).unlink()

    def _path(self, key: str) -> Path:
        return Path(self.file_path, f"{self._get_suffixed_key(key)}{SUFFIX}")
