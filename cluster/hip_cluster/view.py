"""How an endpoint looks on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

COLOURS = {"SERVING": "green", "FAILED": "red", "DRAINING": "yellow", "PENDING": "yellow"}


def show(status: dict[str, Any]) -> None:
    """Print it once."""
    Console().print(table_of(status))


def table_of(status: dict[str, Any]) -> Table:
    """A row a replica."""
    router = status["router"]
    doors = {"managed": f", router at {router['url']}", "external": ", router not ours"}
    door = doors.get(router["mode"], "")
    table = Table(title=f"{status['endpoint']}: {status['wanted']} wanted{door}")
    for column in ("replica", "state", "attempt", "server", "ranks", "steps", "last error"):
        table.add_column(column)
    for replica in status["replicas"]:
        ranks = [rank for rank in replica["ranks"] if rank["name"] != "engine"]
        state = replica["state"]
        table.add_row(
            str(replica["replica"]),
            f"[{COLOURS.get(state, 'cyan')}]{state}[/]",
            str(replica["attempt"]),
            replica["url"],
            " ".join(f"{rank['node']}:{rank['pid']}" for rank in ranks),
            str(max((rank["steps"] for rank in ranks), default=0)),
            replica["error"],
        )
    return table
