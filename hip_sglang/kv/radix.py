"""SGLang's radix tree over the logical pool, with a disk under it.

In the logical pool a cached prefix needs no loading: its KV stays where it is, and the device
fetches what is chosen. This adds what SGLang would drop when memory is short, or at a restart.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sglang.version
import torch
from hip_kernels.layout import PAGE_SIZE
from sglang.srt.mem_cache.hicache_storage import PoolTransfer
from sglang.srt.mem_cache.unified_cache.components import ComponentType, ExternalLinkerLoadPhase
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinkerWrapper
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from hip_sglang.kv import disk_place
from hip_sglang.kv.disk_tier import DiskTier
from hip_sglang.kv.memory import GIB
from hip_sglang.kv.page_files import PageFiles
from hip_sglang.kv.page_record import MAGIC, PageRecords
from hip_sglang.kv.summary_pool import pages_of
from hip_sglang.runtime import doors
from hip_sglang.runtime.offload import ranks_of_machine
from hip_sglang.runtime.requirements import UnsupportedError
from hip_sglang.telemetry import DiskTelemetry

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)

SAMPLES = 64  # numbers of each parameter that are looked at


class HipRadixCache(UnifiedRadixCache):  # type: ignore[misc]
    """SGLang's tree, whose pages are kept on disk, too."""

    def init_cache_linker(self, cache_linker: DiskTier) -> None:
        self.linker = _Disk(self, cache_linker)

    def cache_unfinished_req(self, req: Req, chunked: bool = False, **others: Any) -> None:
        """SGLang backs a prompt up when all of it is read; a long one is written as it is read."""
        # a streaming session tells by it whether it goes on
        super().cache_unfinished_req(req, chunked and req.session is not None, **others)


class _Disk(UnifiedCacheLinkerWrapper):  # type: ignore[misc]
    """What SGLang's tree does with an external store, but that it never learns of a broken page.

    A page is read and verified between its place in the pool being found and its entering the
    tree. Where one cannot be used, on any rank, nothing enters, and the request is matched again.
    """

    cache_linker: DiskTier

    def load_back(self, req: Req) -> Any:
        try:
            return super().load_back(req)
        except _UnusableError:
            # SGLang's word for "ask again": the broken page is not on disk then
            return None

    def _update_load(
        self,
        phase: ExternalLinkerLoadPhase,
        req: Req,
        component_transfers: list[Any],
        prefix_len: int,
        **others: Any,
    ) -> list[PoolTransfer]:
        done: list[PoolTransfer] = super()._update_load(
            phase, req, component_transfers, prefix_len, **others
        )
        if phase == ExternalLinkerLoadPhase.PREPARE:
            full, tree = component_transfers[0][1], self.cache.tree_core
            own = tree.get_hash_values(req.last_node)
            self.cache_linker.before = [*tree.get_prefix_hash_values(req.last_node), *own]
            usable = torch.tensor([self.cache_linker.read(full.device_indices, full.keys)]).int()
            self.cache._all_reduce_attn_groups(usable, torch.distributed.ReduceOp.MIN)
            if not usable.item():
                abort = ExternalLinkerLoadPhase.ABORT
                super()._update_load(abort, req, component_transfers, prefix_len)
                raise _UnusableError
        return done

    def _queue_load(self, rid: str, node_id: int, transfers: list[PoolTransfer]) -> None:
        """Nothing: it was read already."""

    def _offload_node(self, node_id: int, transfers: list[PoolTransfer]) -> None:
        self.cache_linker.before = self.cache.tree_core.get_prefix_hash_values(node_id)
        super()._offload_node(node_id, transfers)


class _UnusableError(Exception):
    """A page on disk is not what it should be."""


def build_tree(ctx: TreeCacheBuildContext) -> HipRadixCache:
    """SGLang's factory for the tree of one rank, where the configuration names a disk."""
    ctx.params.tree_components = (ComponentType.FULL,)
    cache, runner = HipRadixCache(ctx.params), ctx.tp_worker.model_runner
    offload = doors.config_of(ctx.server_args).offload
    assert offload is not None
    assert offload.disk is not None
    records, manifest = PageRecords(runner.attn_backend), manifest_of(runner, ctx.tp_size)
    most = int(offload.disk.gib * GIB) // ranks_of_machine(ctx.server_args)
    if most < records.nbytes:
        raise UnsupportedError(
            f"offload.disk.gib={offload.disk.gib:g} leaves a rank {most / GIB:.3f} GiB, and one "
            f"page of KV takes {records.nbytes / GIB:.3f} GiB; raise it"
        )
    files = None
    try:
        place = disk_place.Place.take(offload.disk.path, manifest, ctx.tp_rank)
        files = PageFiles(place, most)
    except OSError as error:
        logger.warning(
            "hip_attention disk: %s cannot be used, and the server goes on without: %s",
            offload.disk.path,
            error,
        )
    else:
        _report(offload.disk.path, manifest, files)

    def is_current() -> bool:
        return bool(weights_of(runner.model) == manifest["weights"])

    counts = ctx.server_args.enable_metrics and ctx.tp_rank == 0
    telemetry = DiskTelemetry() if counts else None
    pages = pages_of(runner.token_to_kv_pool)
    cache.init_cache_linker(DiskTier(records, files, pages, is_current, telemetry))
    return cache


def manifest_of(runner: ModelRunner, tp_size: int) -> dict[str, Any]:
    """What pages on disk belong to: where any of it differs, they are another model's."""
    args, config = runner.server_args, runner.model_config.hf_config.to_dict()
    hip = doors.config_of(args).model_dump(mode="json", exclude={"offload", "trace"})
    for local in ("_name_or_path", "transformers_version"):
        config.pop(local, None)
    return {
        "layout": MAGIC.decode(),
        "page_size": PAGE_SIZE,
        "sglang": sglang.version.__version__,
        "model": ", ".join(runner.model_config.hf_config.architectures or ["unknown"]),
        "config": _digest(json.dumps(config, sort_keys=True, default=str).encode()),
        "weights": weights_of(runner.model),
        "tokenizer": _digest(*_tokenizer_files(args.tokenizer_path or args.model_path)),
        "kv_dtype": str(runner.kv_cache_dtype),
        "tp_size": tp_size,
        "attention": hip,
    }


def weights_of(model: torch.nn.Module) -> str:
    """A digest of a few numbers of each parameter: it tells fine-tuned models from another."""
    parts = []
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].float().cpu()
        parts += [f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode()]
        parts += [some.numpy().tobytes()]
    return _digest(*parts)


def _tokenizer_files(path: str) -> Iterator[bytes]:
    """Of a local model; tokens of another one are other tokens anyway."""
    for file in sorted(Path(path).glob("*token*")):
        if file.is_file():
            yield file.name.encode()
            yield file.read_bytes()


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _report(root: Path, manifest: Mapping[str, Any], files: PageFiles) -> None:
    """One line on what is there, and one on what is another model's."""
    logger.info(
        "hip_attention disk: %s holds %.2f of %.2f GiB",
        files.file_path,
        files.nbytes / GIB,
        files.most_bytes / GIB,
    )
    for kept in disk_place.kept_in(root):
        if differs := disk_place.changed(kept.manifest, manifest):
            logger.warning(
                "hip_attention disk: %s is set aside, for it was written with another %s; "
                "`hip-sglang cache drop` frees it",
                kept.path,
                ", ".join(differs),
            )
