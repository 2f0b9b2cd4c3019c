"""Every knob of hip-sglang, parsed once: ``HipConfig``, and the ``LayerPlan`` it resolves to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from hip_kernels.layout import NODE_PAGES, PAGE_SIZE, SUB_PAGES, Remainder, SparsePlan, Strategy
from hip_kernels.offloaded import MissPolicy
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from hip_sglang.config_text import ConfigError, explain, read

NODE_TOKENS = NODE_PAGES * PAGE_SIZE
Preset = Literal["balanced", "quality", "dense", "paper"]
Phase = Literal["sparse", "dense"]
Tokens = Annotated[int, Field(strict=True)]
Layer = Annotated[int, Field(strict=True, ge=0)]
Budget = Annotated[
    Tokens, Field(ge=PAGE_SIZE), AfterValidator(lambda tokens: -(-tokens // PAGE_SIZE) * PAGE_SIZE)
]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
Refresh = Annotated[Tokens, Field(ge=1)]

# what a preset decides where nothing else is said
PRESETS: dict[str, dict[str, Any]] = {
    "balanced": {"prefill": "sparse", "decode": "sparse"},
    "quality": {"prefill": "dense", "decode": "sparse", "second_look": 8},
    "dense": {"prefill": "dense", "decode": "dense"},
    "paper": {"prefill": "sparse", "decode": "sparse", "strategy": "tree", "remainder": "none"},
}


class Disk(BaseModel):
    """A disk under host memory, for prefixes that nobody is running."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path = Field(
        description="a directory on a fast local disk; prefixes that are kept there answer after a "
        "restart, too"
    )
    gib: float = Field(gt=0, description="GiB of it for KV, of all ranks on one machine together")


class Offload(BaseModel):
    """KV in host memory. The device holds summaries of all pages, and copies of some."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host_gib: float = Field(
        gt=0, description="GiB of host memory for KV, of all ranks on one machine together"
    )
    device_tokens: Tokens | None = Field(
        default=None,
        ge=PAGE_SIZE,
        description="tokens whose KV a rank's device holds at a time; without it, what its memory "
        "has room for, and on a CPU what the running requests need",
    )
    miss_policy: MissPolicy = Field(
        default="fetch",
        description="what becomes of a chosen page that the device does not hold: fetch waits for "
        "it; estimate leaves it to the remainder this time, and has it there the next time",
    )
    disk: Disk | None = Field(
        default=None, description="keep prefixes on a disk, too, so that a restart loses none"
    )

    @field_validator("device_tokens")
    @classmethod
    def _whole_pages(cls, tokens: int | None) -> int | None:
        return None if tokens is None else -(-tokens // PAGE_SIZE) * PAGE_SIZE


@dataclass(frozen=True)
class LayerPlan:
    """What one layer does: which queries prune, and how."""

    pages: SparsePlan
    means: int  # mean keys a page: 4 of a quarter each, or 1
    sparse_from: int | None  # prefill blocks at this position or later prune; None: never
    sparse_decode_from: int | None  # the same of decode steps
    nodes_from: int | None  # sparse queries at this position or later search through nodes
    refresh: int  # a decode step chooses anew every so many tokens

    @property
    def prunes(self) -> bool:
        return self.sparse_from is not None or self.sparse_decode_from is not None

    def share_read(self, visible_pages: int, exact_pages: float, *, chooses: bool = True) -> float:
        """The share of the KV that a sparse decode step reads, in bytes.

        It reads keys and values of the exact pages, the keys that the search looks at, and the
        summaries of every visible page, or of every node and of the pages of some.
        """
        remainder, budget = self.pages.remainder, self.pages.budget_pages
        rows = 0
        if self.pages.reads_summaries:
            others = (remainder != "none") + (remainder not in ("none", "mean"))
            weighed, nodes = visible_pages, 0
            if self.nodes_from is not None and visible_pages * PAGE_SIZE >= self.nodes_from:
                weighed, nodes = self.pages.beam * NODE_PAGES, visible_pages // NODE_PAGES
            rows = (self.means + others) * weighed + (1 + others) * nodes
        if self.pages.strategy == "tree":
            looked = 2 * budget * max(0, -(-visible_pages // budget) - 1).bit_length()
        else:
            looked = min(self.pages.second_look * budget, visible_pages) * PAGE_SIZE
        read = 2 * exact_pages * PAGE_SIZE + looked * chooses + rows
        return min(1.0, read / (2 * PAGE_SIZE * (visible_pages + 1)))


class LayerGroup(BaseModel):
    """What some layers do otherwise than all others; what is left out is as theirs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: tuple[Layer, ...] = Field(min_length=1, description="layers by number, each only once")
    budget: Budget | None = Field(default=None, description="as for all layers")
    top_p: Share | None = Field(default=None, description="as for all layers")
    refresh: Refresh | None = Field(default=None, description="as for all layers")
    second_look: Tokens | None = Field(default=None, ge=0, description="as for all layers")


class HipConfig(BaseModel):
    """How HiP attention prunes. Token counts are rounded up to whole pages."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: Preset = Field(
        default="balanced",
        description="balanced: both phases sparse; quality: dense prefill, sparse decode by a "
        "second look of 8; dense: nothing is pruned; paper: HiP's own search, what is pruned is "
        "dropped. A key given explicitly overrides its preset.",
    )
    prefill: Phase = Field(
        default="sparse", description="whether prompts are read sparsely; set by the preset"
    )
    decode: Phase = Field(
        default="sparse", description="whether tokens are generated sparsely; set by the preset"
    )
    sink: Tokens = Field(
        default=64, ge=0, description="first tokens of the context, always attended exactly"
    )
    window: Tokens = Field(
        default=1024,
        ge=1,
        description="last tokens before the query, always attended exactly",
    )
    budget: Budget = Field(
        default=2048,
        description="tokens chosen per query and attended exactly, sink and window not counted; "
        f"at least one page of {PAGE_SIZE}",
    )
    top_p: Share = Field(
        default=1.0,
        description="choose no more than hold this share of the estimated softmax mass, together "
        "with sink and window, for every row and head; budget stays the cap",
    )
    dense_threshold: Tokens = Field(
        default=8192, ge=0, description="a query at a position below this attends to everything"
    )
    dense_layers: tuple[Layer, ...] = Field(
        default=(), description="layers that never prune, by number; the first is 0"
    )
    per_layer: tuple[LayerGroup, ...] = Field(
        default=(), description="layers with a budget, top_p, refresh or second_look of their own"
    )
    strategy: Strategy = Field(
        default="summary",
        description="summary chooses pages by what they are estimated to weigh; tree is HiP's "
        "published search by single real keys, without a second look",
    )
    sub_page_means: bool = Field(
        default=True,
        strict=True,
        description="estimate pages by the mean keys of their quarters: finer, for 2% more KV "
        "memory (in pages of 64)",
    )
    second_look: Tokens = Field(
        default=2,
        ge=0,
        description="decode steps choose by real keys, reading this many times the budget of the "
        "most promising ones; 0 trusts the summaries",
    )
    node_threshold: Tokens = Field(
        default=262144,
        ge=0,
        description="sparse queries at positions from this on weigh nodes of 8 pages first, and "
        "then the pages of the heaviest ones; below, every page. Rounded up to whole nodes",
    )
    beam: Tokens = Field(
        default=65536,
        ge=NODE_TOKENS,
        description="tokens of the nodes whose pages are weighed beyond node_threshold; "
        f"at least one node of {NODE_TOKENS}, and with refresh one for each page of the budget",
    )
    refresh: Refresh = Field(
        default=1,
        description="decode steps choose pages anew every so many tokens, and attend to what was "
        "chosen in between; 1 chooses at every step",
    )
    remainder: Remainder = Field(
        default="harmonic",
        description="how pages that are not attended exactly are estimated; none drops them",
    )
    offload: Offload | None = Field(
        default=None,
        description="keep KV in host memory, so that a request may be larger than the device; "
        "second_look is then 0 unless it is given, for it reads keys there",
    )
    trace: Path | None = Field(
        default=None,
        description="append one JSON line per decode step and layer here: the pages attended",
    )

    @model_validator(mode="before")
    @classmethod
    def _what_the_preset_decides(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            decided: dict[str, Any] = dict(PRESETS.get(str(given.get("preset", "balanced")), {}))
            if given.get("offload") is not None:
                decided["second_look"] = 0
            return {**decided, **given}
        return given

    @model_validator(mode="after")
    def _can_be_offloaded(self) -> HipConfig:
        if self.offload is None:
            return self
        for reads_all, key, value in (
            (self.prefill == "dense", "prefill", self.prefill),
            (self.decode == "dense", "decode", self.decode),
            (bool(self.dense_layers), "dense_layers", list(self.dense_layers)),
            (self.strategy == "tree", "strategy", self.strategy),
        ):
            if reads_all:
                raise PydanticCustomError(
                    "cannot_be",
                    "{key}={value} reads keys all over the context, and offload keeps them in host "
                    "memory; leave one of the two out",
                    {"key": key, "value": repr(value)},
                )
        if self.offload.miss_policy == "estimate" and self.remainder == "none":
            raise PydanticCustomError(
                "cannot_be",
                "offload.miss_policy='estimate' leaves pages to the remainder, and there is none; "
                "set remainder to harmonic, or miss_policy to fetch",
            )
        return self

    @model_validator(mode="after")
    def _each_layer_once(self) -> HipConfig:
        seen = set(self.dense_layers)
        for layer in (layer for group in self.per_layer for layer in group.layers):
            if layer in seen:
                raise PydanticCustomError(
                    "cannot_be",
                    "per_layer names layer {layer}, which is named before, there or in "
                    "dense_layers; name it once",
                    {"layer": layer},
                )
            seen.add(layer)
        return self

    @field_validator("sink", "window")
    @classmethod
    def _whole_pages(cls, tokens: int) -> int:
        return -(-tokens // PAGE_SIZE) * PAGE_SIZE

    @field_validator("beam", "node_threshold")
    @classmethod
    def _whole_nodes(cls, tokens: int) -> int:
        return -(-tokens // NODE_TOKENS) * NODE_TOKENS

    @field_validator("trace")
    @classmethod
    def _can_be_made(cls, trace: Path | None) -> Path | None:
        if trace is not None and (trace.is_dir() or not trace.parent.is_dir()):
            raise PydanticCustomError(
                "no_such_file", "it must be a file in a directory that exists"
            )
        return trace

    @classmethod
    def load(
        cls, source: str | Path | Mapping[str, Any] | None = None, preset: str | None = None
    ) -> HipConfig:
        """Read JSON text, a path to a JSON file, or a mapping; ``preset`` is ``--hip-preset``."""
        values, origin = read(source)
        if preset is not None:
            if values.get("preset", preset) != preset:
                raise ConfigError(
                    f"{origin}preset={values['preset']!r} contradicts --hip-preset {preset}; "
                    "give one of the two"
                )
            values["preset"] = preset
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = "; ".join(explain(detail, cls) for detail in error.errors())
            raise ConfigError(origin + problems) from None

    @property
    def start(self) -> int:
        """The position from which on queries are sparse, where they are."""
        # where the exact pages hold all of the context, pruning would keep everything
        exact = self._sized({"budget": self.largest_budget}).exact_pages
        return max(self.dense_threshold, exact * PAGE_SIZE)

    @property
    def step_pages(self) -> int:
        """The most pages that one query attends exactly, dense or sparse."""
        return -(-self.start // PAGE_SIZE)

    @property
    def captures(self) -> bool:
        """Whether CUDA graphs can hold a pass of decode steps: all of it is kernels."""
        return self.trace is None and self.has_kernels

    @property
    def has_kernels(self) -> bool:
        """Whether a GPU's kernels prune so; elsewise torch does."""
        return self._sized({}).has_kernels

    @property
    def nodes_from(self) -> int | None:
        """The position from which on sparse queries search through nodes; None: never."""
        if self.strategy == "tree" or self.prefill == self.decode == "dense":
            return None
        # where the beam holds every node, there is nothing to search through
        return max(self.node_threshold, self._beam_nodes * NODE_TOKENS)

    @property
    def largest_budget(self) -> int:
        """Of any layer, in tokens."""
        return max([self.budget, *(group.budget or 0 for group in self.per_layer)])

    @property
    def refreshes(self) -> set[int]:
        """Every ``refresh`` that a layer may have."""
        return {self.refresh, *(group.refresh or self.refresh for group in self.per_layer)}

    @property
    def named_layers(self) -> list[tuple[str, int]]:
        """("dense_layers", 3): the layers that are spoken of, and where."""
        groups = [("per_layer", layer) for group in self.per_layer for layer in group.layers]
        return [*(("dense_layers", layer) for layer in self.dense_layers), *groups]

    def layer_plan(self, layer_id: int) -> LayerPlan:
        """The settings of one layer, in pages."""
        dense = layer_id in self.dense_layers
        own = next((group for group in self.per_layer if layer_id in group.layers), None)
        given = {} if own is None else own.model_dump(exclude_none=True)
        return LayerPlan(
            pages=self._sized(given),
            means=SUB_PAGES if self.sub_page_means else 1,
            sparse_from=None if dense or self.prefill == "dense" else self.start,
            sparse_decode_from=None if dense or self.decode == "dense" else self.start,
            nodes_from=self.nodes_from,
            refresh=given.get("refresh", self.refresh),
        )

    @property
    def _beam_nodes(self) -> int:
        nodes = self.beam // NODE_TOKENS
        # every page of a choice that is used again may be of another node
        return nodes if self.refreshes == {1} else max(nodes, self.largest_budget // PAGE_SIZE)

    def _sized(self, own: Mapping[str, Any]) -> SparsePlan:
        """The plan of layers that have some settings of their own."""
        looks = own.get("second_look", self.second_look)
        # HiP's search, and what is brought or used again, are of whole pages
        by_parts = looks and self.strategy == "summary" and self.sub_page_means
        by_parts = by_parts and self.offload is None and own.get("refresh", self.refresh) == 1
        return SparsePlan(
            sink_pages=self.sink // PAGE_SIZE,
            window_pages=self.window // PAGE_SIZE,
            budget_pages=own.get("budget", self.budget) // PAGE_SIZE,
            remainder=self.remainder,
            second_look=looks,
            parts=SUB_PAGES if by_parts else 1,
            strategy=self.strategy,
            beam=self._beam_nodes,
            top_p=own.get("top_p", self.top_p),
        )
