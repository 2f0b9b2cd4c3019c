"""One document describes an endpoint: ``EndpointSpec``, read from YAML, checked once."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from hip_cluster.arguments import check_arguments

Gib = Annotated[float, Field(ge=0, le=65536)]
Seconds = Annotated[float, Field(gt=0, le=604800)]
Port = Annotated[int, Field(ge=0, le=65535)]


class SpecError(ValueError):
    """A document that cannot be used; one line for each problem, each with its path."""


class Section(BaseModel):
    """A part of the document: immutable, no unknown keys, no guessing of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Model(Section):
    """What is served."""

    path: str = Field(
        min_length=1,
        description="a directory that every machine has under this path, or a name on Hugging Face",
    )
    served_name: str | None = Field(
        default=None, description="the model's name in the OpenAI API; default: the path"
    )
    context_length: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="tokens; default: what the model's configuration says"
    )
    dtype: str = Field(default="auto", description="of the weights, as SGLang's --dtype")


class Hip(Section):
    """How attention prunes: what ``--hip-preset`` and ``--hip-config`` take."""

    preset: Literal["balanced", "quality", "dense", "paper"] = "balanced"
    config: dict[str, Any] = Field(default_factory=dict, description="keys of HipConfig")


class Parallel(Section):
    """The ranks of one replica, and the machines that they stand on."""

    tp: Annotated[int, Field(ge=1, le=1024)] = Field(default=1, description="tensor parallel ranks")
    pp: Annotated[int, Field(ge=1, le=1024)] = Field(default=1, description="pipeline stages")
    nodes: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=1, description="machines that one replica stands on, with equally many ranks each"
    )
    device: Literal["cuda", "cpu"] = Field(
        default="cuda", description="cuda: one GPU a rank; cpu: processors alone"
    )
    cpus_per_rank: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=1, description="processors that Ray sets aside for each rank"
    )

    serving_resource: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="a custom Ray resource: the machine that has it holds rank 0 and serves HTTP; "
        "default: any machine",
    )

    @model_validator(mode="after")
    def _equal_shares(self) -> Self:
        if self.ranks % self.nodes:
            raise PydanticCustomError(
                "unequal",
                "tp x pp = {ranks} ranks cannot be divided equally among nodes={nodes}; "
                "make nodes a divisor of it",
                {"ranks": self.ranks, "nodes": self.nodes},
            )
        return self

    @property
    def ranks(self) -> int:
        return self.tp * self.pp

    @property
    def ranks_per_node(self) -> int:
        return self.ranks // self.nodes


class Disk(Section):
    """Prefixes on a local disk of each machine, which outlive host memory and a restart."""

    path: str = Field(min_length=1, description="a directory on each machine")
    gib: Annotated[float, Field(gt=0)] = Field(
        description="GiB of it on each machine, divided by its ranks"
    )


class Offload(Section):
    """KV in host memory."""

    host_gib: Annotated[float, Field(gt=0, le=65536)] = Field(
        description="GiB of KV on each machine, divided by its ranks"
    )
    device_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="tokens of the page cache on the device, a rank"
    )
    miss_policy: Literal["fetch", "estimate"] = "fetch"
    disk: Disk | None = None


class Memory(Section):
    """What a machine needs beside offloaded KV; see ``budget.py``."""

    staging_gib_per_rank: Gib = Field(
        default=4.0,
        description="GiB for weights on their way to the GPU; on a CPU the rank's weights and KV",
    )
    shm_gib: Gib = Field(default=2.0, description="GiB of /dev/shm, counted as memory")
    reserve_gib: Gib = Field(default=10.0, description="GiB left to everything else")
    limit_gib: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="GiB that a machine or pod has; more is refused"
    )


class Server(Section):
    """SGLang's HTTP server, or the router in front of it."""

    host: str = Field(default="127.0.0.1", min_length=1)
    port: Annotated[int, Field(ge=1, le=65535)] = 30000
    arguments: list[str] = Field(
        default_factory=list,
        description="more arguments of SGLang's server, such as [--chunked-prefill-size, '8192']",
    )

    @field_validator("arguments")
    @classmethod
    def _not_ours(cls, arguments: list[str]) -> list[str]:
        if problem := check_arguments(arguments):
            raise PydanticCustomError("argument", "{problem}", {"problem": problem})
        return arguments


class Router(Section):
    """What stands before the replicas."""

    mode: Literal["none", "managed", "external"] = Field(
        default="none",
        description="none: clients reach the one replica; managed: started here; external: another "
        "program finds this replica by its readiness (/health)",
    )
    policy: str = Field(default="cache_aware", description="smg's --policy")
    command: list[str] = Field(
        default_factory=list,
        description="another router's command line; {host}, {port} and {policy} are filled in",
    )
    arguments: list[str] = Field(default_factory=list, description="more arguments of the router")
    notice_s: Seconds = Field(
        default=30.0,
        description="external: seconds that a draining replica, unhealthy by then, goes on to "
        "answer for routers that have not noticed yet; more than their probes take to notice",
    )

    @model_validator(mode="after")
    def _of_one_mode(self) -> Self:
        ours = {"policy", "command", "arguments"} & self.model_fields_set
        if ours and self.mode != "managed":
            raise PydanticCustomError(
                "not_managed",
                "{key} is for a router that is started here; take it out, or set mode to managed",
                {"key": sorted(ours)[0]},
            )
        if "notice_s" in self.model_fields_set and self.mode != "external":
            raise PydanticCustomError("not_external", "notice_s is for mode external; take it out")
        return self


class Auth(Section):
    """Keys, by file or by environment: never in this document."""

    api_key_file: str | None = Field(default=None, description="a file with the endpoint's key")
    api_key_env: str | None = Field(
        default=None, description="the name of a variable with the endpoint's key"
    )
    ray_token: bool = Field(default=True, description="refuse a Ray cluster without token")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.api_key_file is not None and self.api_key_env is not None:
            raise PydanticCustomError(
                "two_keys", "give api_key_file or api_key_env, not both; take one out"
            )
        return self


class Limits(Section):
    """Times, and how often to try again."""

    place_s: Seconds = Field(default=300.0, description="seconds to wait for free machines")
    startup_s: Seconds = Field(default=1800.0, description="seconds to load and warm up")
    drain_s: Seconds = Field(
        default=600.0, description="seconds that running requests get to end by themselves"
    )
    hang_s: Seconds | None = Field(
        default=None,
        description="seconds with work and without a step after which a rank hangs; default: by "
        "the size of a prefill chunk",
    )
    silence_s: Seconds = Field(
        default=15.0, description="seconds without a word from a rank after which it hangs"
    )
    restarts: Annotated[int, Field(ge=0, le=1000)] = Field(
        default=5, description="restarts of a replica within window_s; one more is a crash loop"
    )
    window_s: Seconds = 900.0
    backoff_s: Seconds = Field(default=1.0, description="seconds before the second restart")
    max_backoff_s: Seconds = Field(default=60.0, description="it doubles up to this")


class Supervisor(Section):
    """Where the supervisor listens."""

    host: str = Field(default="127.0.0.1", description="of its commands and metrics")
    port: Port = Field(default=0, description="of its commands and metrics; 0: any")
    link_port: Port = Field(default=0, description="that ranks connect to; 0: any")


class EndpointSpec(Section):
    """One endpoint: a model, its replicas, and what stands before them."""

    name: str = Field(
        pattern=r"^[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?$",
        description="small letters, digits and dashes, at most 40",
    )
    model: Model
    hip: Hip = Hip()
    parallel: Parallel = Parallel()
    replicas: Annotated[int, Field(ge=1, le=1024)] = 1
    offload: Offload | None = None
    memory: Memory = Memory()
    server: Server = Server()
    router: Router = Router()
    auth: Auth = Auth()
    limits: Limits = Limits()
    supervisor: Supervisor = Supervisor()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.replicas > 1 and self.router.mode == "none":
            raise PydanticCustomError(
                "no_router",
                "replicas={replicas} need something before them; set router.mode to managed",
                {"replicas": self.replicas},
            )
        if self.replicas > 1 and self.router.mode == "external":
            raise PydanticCustomError(
                "external",
                "with router.mode external each replica has a document of its own; "
                "set replicas to 1",
            )
        self._check_memory()
        self._check_hip()
        return self

    def _check_memory(self) -> None:
        from hip_cluster.budget import host_memory

        need, limit = host_memory(self), self.memory.limit_gib
        if limit is not None and need.total_mib > limit * 1024:
            raise PydanticCustomError(
                "memory",
                "memory.limit_gib={limit} is too small: {sum}; raise it or lower a part",
                {"limit": f"{limit:g}", "sum": need.sentence()},
            )

    def _check_hip(self) -> None:
        # torch comes with it
        from hip_sglang.config import HipConfig
        from hip_sglang.config_text import ConfigError

        if "offload" in self.hip.config:
            raise PydanticCustomError(
                "offload", "hip.config.offload: the document has a section `offload`; say it there"
            )
        try:
            HipConfig.load(self.hip_config)
        except ConfigError as error:
            problem = str(error).removeprefix("hip_config: ")
            raise PydanticCustomError("hip", "hip.config: {p}", {"p": problem}) from None

    @property
    def hip_config(self) -> dict[str, Any]:
        """What ``--hip-config`` gets: the pruning, and the offload where there is one."""
        values = {**self.hip.config, "preset": self.hip.preset}
        if self.offload is not None:
            values["offload"] = self.offload.model_dump(exclude_none=True)
        return values

    @classmethod
    def load(cls, path: str | Path) -> EndpointSpec:
        """Read a YAML file. Raises SpecError, one line for each problem."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise SpecError(f"{path}: {error.strerror or error}; give an endpoint's file") from None
        except UnicodeDecodeError:
            raise SpecError(f"{path}: not a text file; give YAML in UTF-8") from None
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, origin: str = "endpoint") -> EndpointSpec:
        """Read YAML text; ``origin`` stands before each problem. Raises SpecError."""
        try:
            values = yaml.load(text, Loader=_UniqueKeys)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            problem = getattr(error, "problem", None) or "it cannot be read"
            raise SpecError(f"{origin}: not valid YAML{where}: {problem}; mend it there") from None
        if not isinstance(values, Mapping):
            raise SpecError(f"{origin}: expected keys such as `name:` and `model:`")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = [f"{origin}: {_explain(detail)}" for detail in error.errors()]
            raise SpecError("\n".join(lines)) from None


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _explain(detail: Any) -> str:
    """One problem that pydantic found, by its path."""
    path = [str(part) for part in detail["loc"]]
    where = ".".join(path)
    if detail["type"] == "extra_forbidden":
        known = _keys_beside(path)
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the keys here are {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    if detail["type"] == "missing":
        return f"{where}: missing; give it"
    message = detail["msg"][0].lower() + detail["msg"][1:]
    # a list may hold a key that somebody put where it does not belong
    if not where or isinstance(detail["input"], Mapping | list | Section):
        return f"{where}: {message}" if where else message
    given = str(detail["input"])
    return f"{where}={given if len(given) < 60 else given[:57] + '...'}: {message}"


def _keys_beside(path: list[str]) -> list[str]:
    section: Any = EndpointSpec
    for part in path[:-1]:
        annotation = section.model_fields[part].annotation
        # `Offload | None`
        options = [annotation, *getattr(annotation, "__args__", ())]
        section = next(
            (one for one in options if isinstance(one, type) and issubclass(one, Section)), Section
        )
    return list(section.model_fields)
