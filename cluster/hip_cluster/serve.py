"""``python -m hip_cluster.serve endpoint.yaml``: the supervisor, in the foreground.

What ``hip-cluster up`` starts, and what ``ray job submit`` may start anywhere on a cluster.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from hip_cluster import logs, state
from hip_cluster.cli import load
from hip_cluster.keys import read_key
from hip_cluster.ports import require_free
from hip_cluster.ray_cluster import ClusterError, RayCluster, head_is_gone, require_token
from hip_cluster.spec import EndpointSpec
from hip_sglang.cli_errors import CliError, one_line_errors

# Ray is gone: whoever started this may start it again
LOST = 75
ROUTER_PAUSE_SECONDS = 0.2

log = logging.getLogger("hip_cluster")
app = typer.Typer(add_completion=False)


@app.command()
def serve(
    file: Annotated[Path, typer.Argument(help="The endpoint's document, YAML.")],
    address: Annotated[
        str | None, typer.Option(help="Ray's address; default: $RAY_ADDRESS, or this machine's.")
    ] = None,
    own_ray: Annotated[
        bool, typer.Option("--own-ray", help="Start Ray on this machine, and end it again.")
    ] = False,
) -> None:
    """Run an endpoint until it is ended, or given up."""
    logs.start("supervisor")
    spec = load(file)
    with one_line_errors():
        folder = state.folder_of(spec.name)
        key = read_key(spec.auth.api_key_file, spec.auth.api_key_env)
        if spec.router.mode == "managed":
            require_free(spec.server.host, spec.server.port, "server.port")
        if spec.supervisor.port:
            require_free(spec.supervisor.host, spec.supervisor.port, "supervisor.port")
    try:
        require_token(spec.auth.ray_token, own_ray, folder)
        cluster = RayCluster(address, own={} if own_ray else None)
    except ClusterError as error:
        raise CliError(str(error)) from None
    try:
        code = asyncio.run(Serving(spec, cluster, folder, key).run())
    except ClusterError as error:
        raise CliError(f"endpoint {spec.name} was given up: {error}") from None
    except OSError as error:
        raise CliError(f"the supervisor cannot listen: {error}; see `supervisor`") from None
    finally:
        state.remove_door(spec.name)
        cluster.close()
    raise typer.Exit(code)


class Serving:
    """One endpoint from start to end."""

    def __init__(self, spec: EndpointSpec, cluster: RayCluster, folder: Path, key: Any) -> None:
        from hip_cluster.control import Control
        from hip_cluster.fleet import Fleet
        from hip_cluster.metrics import Metrics

        self._spec, self._cluster, self._folder, self._key = spec, cluster, folder, key
        self._metrics = Metrics(spec.name)
        self._fleet = Fleet(spec, cluster, key, self._metrics)
        self._end = asyncio.Event()
        self._control = Control(self._fleet, self._metrics, self._end.set)

    async def run(self) -> int:
        """The exit code; raises ClusterError where every replica was given up."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(signum, self._end.set)
        supervisor = self._spec.supervisor
        url = await self._control.start(supervisor.host, supervisor.port)
        state.write_door(self._spec.name, state.Door(url, self._control.token, os.getpid()))
        log.info("endpoint %s: supervisor at %s", self._spec.name, url)
        watcher: asyncio.Task[Any] = asyncio.create_task(head_is_gone(self._cluster.address))
        work: set[asyncio.Task[Any]] = {
            asyncio.create_task(self._serve(url)),
            asyncio.create_task(self._end.wait()),
            watcher,
        }
        done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
        if watcher in done:
            self._leave_without_ray()
        try:
            for task in done:
                task.result()
        finally:
            for task in work:
                task.cancel()
            await self._fleet.stop()
            if self._fleet.router is not None:
                await self._fleet.router.stop()
            await self._control.stop()
        return 0

    async def _serve(self, url: str) -> None:
        from hip_cluster.control import PLACEHOLDER
        from hip_cluster.router import Router

        await self._fleet.start()
        if self._spec.router.mode != "managed":
            return await self._fleet.run()
        self._fleet.router = Router(
            self._spec,
            self._folder / "router.log",
            self._key,
            url + PLACEHOLDER,
            lambda known: setattr(self._control, "believed_in", known),
        )
        await self._fleet.router.start()
        log.info("router at %s", self._fleet.router.url)
        keeper = asyncio.create_task(self._keep_router())
        try:
            await self._fleet.run()
        finally:
            keeper.cancel()
            with suppress(asyncio.CancelledError):
                await keeper

    async def _keep_router(self) -> None:
        router = self._fleet.router
        assert router is not None
        while True:
            code = await router.wait()
            log.warning("the router ended with code %d; starting it again", code)
            self._metrics.router_restarts.inc()
            await asyncio.sleep(ROUTER_PAUSE_SECONDS)
            try:
                await router.start()
            except (ClusterError, httpx.HTTPError) as error:
                log.error("%s", error)

    def _leave_without_ray(self) -> None:
        """Ray's libraries would wait a minute for a head that is gone, and then abort."""
        log.error("Ray's head at %s is gone", self._cluster.address)
        if self._fleet.router is not None and self._fleet.router.pid is not None:
            os.kill(self._fleet.router.pid, signal.SIGKILL)
        state.remove_door(self._spec.name)
        sys.stdout.flush()
        os._exit(LOST)


def main() -> None:
    """The entry point; what the user can mend is one line on stderr."""
    from typer.exceptions import TyperException

    try:
        code = typer.main.get_command(app).main(standalone_mode=False)
    except TyperException as error:
        print(f"hip-cluster: {error.format_message()}", file=sys.stderr)
        code = 2
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
