"""What offloaded KV takes, and where: arithmetic alone, so that it can be asked before a start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hip_kernels.layout import NODE_PAGES, PAGE_SIZE, SUB_PAGES

from hip_sglang.config import HipConfig
from hip_sglang.config_text import ConfigError

GIB = 1 << 30
# what the device keeps of a slot beside its page, two numbers, and of a page of the pool, one
SLOT_BYTES, PAGE_BYTES = 12, 4


@dataclass(frozen=True)
class KVShape:
    """The KV of one rank: how many layers and KV heads it has, and how large a key and a value."""

    layers: int
    kv_heads: int
    head_dim: int
    value_dim: int
    itemsize: int  # bytes of a number

    @classmethod
    def of(cls, model: Mapping[str, Any], itemsize: int, tp: int = 1) -> KVShape:
        """From a model's ``config.json``; ``itemsize`` is that of the KV's dtype.

        Raises ``ConfigError`` where it does not describe attention heads, or ``tp`` ranks cannot
        share them.
        """
        text = model.get("text_config") or model
        try:
            heads = int(text["num_attention_heads"])
            kv_heads = int(text.get("num_key_value_heads") or heads)
            width = int(text.get("head_dim") or int(text["hidden_size"]) // heads)
            layers = int(text["num_hidden_layers"])
        except KeyError as missing:
            raise ConfigError(
                f"the model's config.json has no {missing}; name another model"
            ) from None
        if kv_heads % tp:
            raise ConfigError(
                f"{tp} ranks cannot share {kv_heads} KV heads; use a --tp that divides {kv_heads}"
            )
        return cls(layers, kv_heads // tp, width, int(text.get("v_head_dim") or width), itemsize)

    @property
    def heads(self) -> int:
        """KV heads of all layers."""
        return self.layers * self.kv_heads

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token."""
        return self.heads * (self.head_dim + self.value_dim) * self.itemsize

    def summary_bytes(self, means: int) -> int:
        """The summary of one page: mean keys, their deviation, the mean value."""
        # as SummaryPool stores them: float32 beside float32, elsewise half precision
        itemsize = 4 if self.itemsize == 4 else 2
        return self.heads * ((means + 1) * self.head_dim + self.value_dim) * itemsize


@dataclass(frozen=True)
class MemoryPlan:
    """What one rank holds of the KV: all of it in host memory, some of it on the device."""

    logical_tokens: int
    host_bytes: int
    device_tokens: int
    running: int  # requests at once
    cache_bytes: int
    summary_bytes: int
    table_bytes: int

    @classmethod
    def of(
        cls,
        shape: KVShape,
        config: HipConfig,
        *,
        host_bytes: int,
        context: int,
        running: int,
        device_bytes: int | None,
    ) -> MemoryPlan:
        """For requests of up to ``context`` tokens, ``running`` at once or as many as can.

        ``host_bytes`` and ``device_bytes`` are the rank's, for KV alone; without the latter the
        device has room for what is asked for. Raises ``ConfigError`` with the number needed where
        one request does not fit.
        """
        assert config.offload is not None
        page_bytes = shape.token_bytes * PAGE_SIZE
        # page 0 is SGLang's padding
        pages = host_bytes // page_bytes - 1
        if pages < 1:
            raise ConfigError(
                f"offload.host_gib={config.offload.host_gib:g} leaves this rank "
                f"{host_bytes / GIB:.3f} GiB, and one page of KV takes {page_bytes / GIB:.3f} GiB; "
                "raise it"
            )
        means = SUB_PAGES if config.sub_page_means else 1
        nodes = 0  # places for them
        if config.nodes_from is not None and config.nodes_from < context:
            nodes = pages // NODE_PAGES + running
        summaries = shape.summary_bytes(means) * (pages + 1) + shape.summary_bytes(1) * nodes
        tables = shape.heads * PAGE_BYTES * (pages + 1)
        slot_bytes = page_bytes + shape.heads * SLOT_BYTES
        asked = config.offload.device_tokens
        wanted = running * config.step_pages if asked is None else asked // PAGE_SIZE
        if device_bytes is not None:
            room = (device_bytes - summaries - tables) // slot_bytes
            least = config.step_pages if asked is None else wanted
            if room < min(least, pages):
                raise ConfigError(
                    f"the device has {device_bytes / GIB:.2f} GiB for KV, and "
                    f"{(summaries + tables + least * slot_bytes) / GIB:.2f} GiB are needed: "
                    f"summaries and tables {(summaries + tables) / GIB:.2f} GiB, and "
                    f"{least * PAGE_SIZE:,} tokens of KV; lower offload.host_gib"
                    + ("" if asked is None else " or offload.device_tokens")
                )
            wanted = room if asked is None else wanted
        slots = min(wanted, pages)
        return cls(
            logical_tokens=pages * PAGE_SIZE,
            host_bytes=(pages + 1) * page_bytes,
            device_tokens=slots * PAGE_SIZE,
            # what fits the device as a whole needs no more
            running=running if slots == pages else min(running, slots // config.step_pages),
            cache_bytes=slots * page_bytes,
            summary_bytes=summaries,
            table_bytes=tables + slots * shape.heads * SLOT_BYTES,
        )

    def __str__(self) -> str:
        def gib(size: int) -> str:
            return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / (1 << 20):.1f} MiB"

        return (
            f"logical {self.logical_tokens:,} tokens = {gib(self.host_bytes)} host; device cache "
            f"{self.device_tokens:,} tokens = {gib(self.cache_bytes)}; summaries "
            f"{gib(self.summary_bytes)}; tables {gib(self.table_bytes)}; {self.running} running "
            "requests at most"
        )
