"""SGLang's engine on Ray: actors for the ranks, and SGLang's own HTTP server beside rank 0.

The one file here that imports ``sglang.srt``. Nothing of SGLang, and no torch, is imported before
the environment is set: so what actors are given is pickled once more, as bytes.
"""

from __future__ import annotations

import io
import itertools
import os
import pickle
import socket
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hip_cluster import logs, scrape
from hip_cluster.arguments import server_arguments
from hip_cluster.door import Door
from hip_cluster.environment import adopt, carried
from hip_cluster.janitor import Janitor
from hip_cluster.link import Link, Member, Progress
from hip_cluster.ports import free_port, require_free
from hip_cluster.request_log import RequestLog, carry_request_ids, logged
from hip_cluster.spec import EndpointSpec
from hip_sglang.secret import Secret

# Ray would hide every GPU from the HTTP server's process, which has none, and SGLang asks there
# what kind of GPU the ranks have
ALL_GPUS = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}
# a log line is enough for the person; the traceback is in the actor's log
PROBLEM_CHARACTERS = 500


@dataclass(frozen=True)
class Group:
    """One attempt to run a replica: what each of its processes is told."""

    spec: EndpointSpec
    member: Member  # the engine's own
    supervisor: tuple[str, int]
    environment: dict[str, str]
    host: str | None  # where the HTTP server listens; None: its machine's address
    port: int  # 0: any


def start_engine(group: Group, placement_group: PlacementGroup, name: str) -> Any:
    """Start the HTTP server's actor on bundle 0, which starts the ranks; returns its handle."""
    actor = ray.remote(EngineActor).options(
        name=name,
        num_cpus=0,
        max_restarts=0,
        runtime_env=ALL_GPUS if group.spec.parallel.device == "cuda" else None,
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            placement_group=placement_group, placement_group_bundle_index=0
        ),
    )
    return actor.remote(pickle.dumps(group), group.environment, placement_group)


class EngineActor:
    """SGLang's HTTP server, tokenizer and detokenizer."""

    def __init__(
        self, group: bytes, environment: dict[str, str], placement_group: PlacementGroup
    ) -> None:
        # a probe that generates waits behind a long prefill, and a router would give up a replica
        # that reads; who is dead or hangs the supervisor knows
        adopt({**environment, "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false"})
        self._group: Group = pickle.loads(group)
        self._name: str = self._group.member.title
        logs.start(self._name)
        self._placement_group = placement_group
        self._janitor = Janitor()
        self._link = Link(self._group.supervisor, self._group.member)
        self._link.start()

    def __repr__(self) -> str:
        # ray tells by it whose lines are whose
        return self._name

    def serve(self) -> None:
        """Load the model, then answer requests until the process ends."""
        group = self._group
        with _problems_told(self._link, group.member.name):
            require_model(group.spec.model.path)
            host = group.host or node_address()
            if group.port:
                require_free(host, group.port, "server.port")
            port = group.port or free_port(host)
            server_args = make_server_args(group.spec, host, port, self._link.welcome)
            engine = make_engine_class(group, self._placement_group, self._janitor)
            url = f"http://{_reachable(host)}:{port}"
            launch_server(server_args, engine, self._link, url)


class SchedulerActor:
    """One rank: SGLang's scheduler, with our plugin."""

    def __init__(
        self,
        call: bytes,
        environment: dict[str, str],
        member: Member,
        address: Any,
        has_shelf: bool,
    ) -> None:
        adopt(environment)
        self._title = member.title
        logs.start(self._title)
        self._janitor = Janitor()
        self._link = Link(address, member)
        self._link.start()
        self._name = member.name
        self._shelf = scrape.Shelf(node_address(), member.secret) if has_shelf else None
        if self._shelf is not None:
            self._janitor.sweep_later(self._shelf.folder)
        with _problems_told(self._link, self._name):
            self.scheduler = make_scheduler(**pickle.loads(call))
        self._link.watch_progress(lambda: progress_of(self.scheduler))
        self._link.send(kind="loaded")

    def __repr__(self) -> str:
        return self._title

    def metrics_address(self) -> scrape.Address | None:
        """Where the server fetches what is counted here; None beside it."""
        return None if self._shelf is None else self._shelf.address

    def get_info(self) -> dict[str, Any]:
        """What SGLang's engine asks of a scheduler that is ready."""
        info: dict[str, Any] = self.scheduler.get_init_info()
        return info

    def run_event_loop(self) -> None:
        """Blocks until SGLang shuts down."""
        from sglang.srt.runtime_context import get_device

        with _problems_told(self._link, self._name):
            if self.scheduler.device == "cuda":
                import torch

                torch.cuda.set_device(get_device().gpu_id)
            self.scheduler.run_event_loop()


def make_server_args(spec: EndpointSpec, host: str, port: int, welcome: Any) -> Any:
    """SGLang's arguments for one replica, with our plugin's taken in. Raises ValueError."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.server_args import prepare_server_args

    said = io.StringIO()
    try:
        # argparse prints what is wrong, and leaves
        with redirect_stderr(said):
            server_args = prepare_server_args(server_arguments(spec, host, port))
    except SystemExit:
        problem = said.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        raise ValueError(f"server.arguments: {problem}; mend it there") from None
    # not a command line of a person: errors are raised, not printed
    server_args._launch_command = f"Engine(endpoint={spec.name})"
    if welcome.get("api_key") is not None:
        server_args.api_key = Secret(welcome["api_key"])
    return server_args


def make_engine_class(group: Group, placement_group: PlacementGroup, janitor: Janitor) -> type:
    """SGLang's RayEngine with our actors, on our placement group, GPUs or none."""
    from sglang.srt.entrypoints.engine import _calculate_rank_ranges
    from sglang.srt.ray.engine import RayEngine, RaySchedulerInitResult

    class HipRayEngine(RayEngine):  # type: ignore[misc]
        """Starts one actor a rank, and says what went wrong on the first that fails."""

        @classmethod
        def _launch_scheduler_processes(
            cls, server_args: Any, port_args: Any, run_scheduler_process_func: Any, **_: Any
        ) -> tuple[Any, None]:
            janitor.sweep_later(*left_behind(port_args))
            address = node_address()
            actors = []
            for bundle in range(group.spec.parallel.nodes):
                stages, shards, stages_here, shards_here = _calculate_rank_ranges(bundle)
                for stage in stages:
                    for shard in shards:
                        call = {
                            "server_args": server_args,
                            "port_args": port_args,
                            "gpu_id": stage % stages_here * shards_here + shard % shards_here,
                            "tp_rank": shard,
                            "pp_rank": stage,
                            "dist_init_addr": f"{address}:{port_args.nccl_port}",
                        }
                        rank = stage * group.spec.parallel.tp + shard
                        actors.append(_start_rank(group, placement_group, bundle, rank, call))
            infos = ray.get([actor.get_info.remote() for actor in actors])
            addresses = ray.get([actor.metrics_address.remote() for actor in actors])
            loops = [actor.run_event_loop.remote() for actor in actors]
            result = RaySchedulerInitResult(
                scheduler_infos=infos,
                block_until_scheduler_exits=lambda: ray.get(loops),
                scheduler_actors=actors,
            )
            # kept with the result: a task whose reference is dropped may be cancelled
            result.event_loop_refs = loops
            away = [(rank, found) for rank, found in enumerate(addresses) if found]
            result.shelves = scrape.Shelves(away, group.member.secret)
            return result, None

    return HipRayEngine


def left_behind(port_args: Any) -> list[str]:
    """Patterns of what an engine's processes share on their machine, besides what has their pid."""
    sockets = [
        str(value).removeprefix("ipc://")
        for value in vars(port_args).values()
        if str(value).startswith("ipc:///")
    ]
    metrics = os.environ.get(scrape.FOLDER_VARIABLE, "")
    # one that SGLang made; a user's own stays
    made = [metrics] if Path(metrics).name.startswith("tmp") else []
    copies = [scrape.pattern(metrics)] if metrics else []
    return [f"/dev/shm/sglang_loads_{port_args.instance_id}_*", *sockets, *copies, *made]


def _start_rank(
    group: Group, placement_group: PlacementGroup, bundle: int, rank: int, call: Any
) -> Any:
    member = replace(group.member, role="rank", rank=rank)
    parallel = group.spec.parallel
    environment = {**group.environment, **carried()}
    counts = scrape.FOLDER_VARIABLE in os.environ
    if counts and bundle == 0:
        environment[scrape.FOLDER_VARIABLE] = os.environ[scrape.FOLDER_VARIABLE]
    if "SGLANG_CPU_OMP_THREADS_BIND" in os.environ and parallel.device == "cpu":
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = os.environ["SGLANG_CPU_OMP_THREADS_BIND"]
    actor = ray.remote(SchedulerActor).options(
        name=f"{member.endpoint}:{member.replica}:{member.attempt}:rank-{rank}",
        num_cpus=0,
        num_gpus=1 if parallel.device == "cuda" else 0,
        max_restarts=0,
        runtime_env=ALL_GPUS if parallel.device == "cuda" else None,
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            placement_group=placement_group, placement_group_bundle_index=bundle
        ),
    )
    has_shelf = counts and bundle > 0
    return actor.remote(pickle.dumps(call), environment, member, group.supervisor, has_shelf)


def make_scheduler(
    server_args: Any,
    port_args: Any,
    gpu_id: int,
    tp_rank: int,
    pp_rank: int,
    dist_init_addr: str,
) -> Any:
    """What SGLang does in a rank's process, with plugins loaded first."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.arg_groups.overrides import declare_resolution
    from sglang.srt.managers.scheduler import (
        Scheduler,
        configure_scheduler_process,
        resolve_spawn_dp_rank,
    )
    from sglang.srt.runtime_context import SpawnRanks, publish, spawn_world_rank

    require_model(server_args.model_path)
    declare_resolution(server_args, "hip_cluster", dist_init_addr=dist_init_addr)
    assigned = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    if assigned:
        gpu_id = device_index(assigned[0], os.environ.get("CUDA_VISIBLE_DEVICES"))
    world_rank = spawn_world_rank(server_args, tp_rank=tp_rank, pp_rank=pp_rank)
    ranks = SpawnRanks(world_rank=world_rank, dp_rank=resolve_spawn_dp_rank(None), gpu_id=gpu_id)
    publish(server_args, role="scheduler", ranks=ranks)
    configure_scheduler_process(server_args, gpu_id)
    return logged(Scheduler)(server_args=server_args, port_args=port_args)


def device_index(assigned: str, visible: str | None) -> int:
    """Which of the devices that this process sees is the one that Ray gave it."""
    seen = visible.split(",") if visible else []
    return seen.index(assigned) if assigned in seen else int(assigned)


def progress_of(scheduler: Any) -> Progress:
    """Steps made, and whether there is something to do; a paused engine has nothing to do."""
    busy = not scheduler._engine_paused and (
        bool(scheduler.waiting_queue)
        or scheduler.chunked_req is not None
        or not scheduler.running_batch.is_empty()
    )
    return Progress(steps=scheduler.forward_ct, busy=busy)


def launch_server(server_args: Any, engine: Any, link: Link, url: str) -> None:
    """SGLang's ``launch_server`` with another engine class; the supervisor is told when warm."""
    from sglang.srt.entrypoints import http_server
    from sglang.srt.entrypoints.engine import (
        init_tokenizer_manager,
        run_detokenizer_process,
        run_scheduler_process,
    )

    parts = engine._launch_subprocesses(
        server_args,
        init_tokenizer_manager_func=init_tokenizer_manager,
        run_scheduler_process_func=run_scheduler_process,
        run_detokenizer_process_func=run_detokenizer_process,
    )
    tokenizer_manager, template_manager, port_args, schedulers, watchdog, _ = parts
    carry_request_ids(tokenizer_manager)
    tokenizer_manager.request_logger = RequestLog(tokenizer_manager.request_logger)
    running: set[int] = set()
    http_server.app.add_middleware(
        Door,
        is_draining=lambda: link.draining,
        refresh=schedulers.shelves.fetch,
        running=running,
    )
    # steps are made by ranks: a server that reports does not hang
    reports = itertools.count()
    link.watch_progress(lambda: Progress(steps=next(reports), busy=bool(running)))
    http_server._setup_and_run_http_server(
        server_args,
        tokenizer_manager,
        template_manager,
        port_args,
        schedulers.scheduler_infos,
        watchdog,
        launch_callback=lambda: link.send(kind="ready", url=url),
    )


def require_model(path: str) -> None:
    """Refuse a directory that this machine does not have; a name is looked up by SGLang."""
    if path.startswith((".", "/", "~")) and not Path(path).is_dir():
        raise FileNotFoundError(
            f"model.path={path} does not exist on {socket.gethostname()}; "
            "copy the model there, or mount it"
        )


def node_address() -> str:
    """The address by which other machines of the cluster reach this one."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def _reachable(host: str) -> str:
    return node_address() if host in ("0.0.0.0", "::") else host


@contextmanager
def _problems_told(link: Link, name: str) -> Iterator[None]:
    """Tell the supervisor in one line what ends this process, and let it end.

    What is wrong with the document or with a machine's files is final: another attempt would end
    the same way.
    """
    try:
        yield
    except BaseException as error:
        final = isinstance(error, ValueError | FileNotFoundError | SystemExit)
        link.send(kind="failed", problem=f"{name}: {one_line(error)}", final=final)
        raise


def one_line(error: BaseException) -> str:
    """An error for people: Ray's own show a traceback, of which the last line says it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    return text[:PROBLEM_CHARACTERS]
