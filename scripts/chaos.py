"""Breaks an endpoint in every way that we know, and writes how it took that to docs/operations.md.

Two Ray nodes on this machine, TP=2 of the built-in model over both, a router. Exits non-zero on a
hung request, on something left behind, and on a missed target.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from hip_cluster.faults import (
    Outcome,
    kill_head,
    kill_node,
    kill_rank,
    kill_router,
    kill_supervisor,
    shared_memory,
    stop_rank,
)
from hip_cluster.local import LocalNodes, local_endpoint, local_nodes
from hip_cluster.ports import free_port
from rich.console import Console

from hip_sglang.bench import load_bench
from hip_sglang.demo.model import write_model

ROOT = Path(__file__).resolve().parent.parent
OPERATIONS = ROOT / "docs" / "operations.md"
MARKS = "<!-- chaos: written by `make chaos` -->\n", "<!-- end of chaos -->\n"
SILENCE_S = 5.0
# seconds: until no client is sent there, until its next attempt has machines
TARGETS = {
    "rank killed": (2.0, 3.0),
    "rank stopped": (SILENCE_S + 2.0, 3.0),
    "node killed": (5.0, None),
    "supervisor killed": (15.0, None),
}


def main() -> int:
    """Every fault once; 1 where something is not as it should be."""
    before = shared_memory()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run(Path(folder))
    left = {name for name in shared_memory() - before if not name.startswith("sem.")}
    problems = [f"{one.fault}: {said}" for one in outcomes for said in [*one.problems, *late(one)]]
    problems += [f"left in /dev/shm: {', '.join(sorted(left))}"] if left else []
    rows = load_bench("rows")
    metrics = {
        f"{one.fault}: {name}": ("s", [value])
        for one in outcomes
        for name in ("seen_s", "placed_s", "serving_s")
        if (value := getattr(one, name)) is not None
    }
    rows.save("chaos", {"tp": 2, "nodes": 2, "silence_s": SILENCE_S}, metrics)
    write_table(outcomes, rows.provenance())
    for problem in problems:
        print(f"chaos: {problem}", file=sys.stderr)
    return 1 if problems else 0


def run(folder: Path) -> list[Outcome]:
    """The faults, in an order in which each finds a serving endpoint."""
    console, outcomes = Console(stderr=True), []
    write_model(folder / "model")
    with local_nodes((1, 1), folder) as nodes:
        document = endpoint_of(folder / "model")
        with local_endpoint(document, folder / "a", "--address", nodes.address) as endpoint:
            endpoint.wait_for("SERVING")
            for fault in (
                lambda: kill_rank(endpoint, None),
                lambda: stop_rank(endpoint, None),
                lambda: kill_node(endpoint, nodes, None),
                lambda: kill_router(endpoint, None),
                lambda: kill_supervisor(endpoint, lambda: held(nodes)),
            ):
                outcomes.append(fault())
                console.print(outcomes[-1])
    document = endpoint_of(folder / "model", parallel={"device": "cpu"}, name="chaos-up")
    with local_endpoint(document, folder / "b", up=True) as endpoint:
        endpoint.wait_for("SERVING")
        outcomes.append(kill_head(endpoint, None))
        console.print(outcomes[-1])
    return outcomes


def endpoint_of(model: Path, **more: object) -> dict[str, object]:
    """The document of the endpoint that is broken."""
    return {
        "name": "chaos",
        "model": {"path": str(model), "context_length": 16384},
        "parallel": {"tp": 2, "nodes": 2, "device": "cpu"},
        "memory": {"staging_gib_per_rank": 0.25, "shm_gib": 0.25, "reserve_gib": 0.5},
        "server": {
            "port": free_port("127.0.0.1"),
            "arguments": ["--max-total-tokens", "32768", "--sleep-on-idle"],
        },
        "router": {"mode": "managed"},
        "limits": {"silence_s": SILENCE_S, "restarts": 20},
        **more,
    }


def held(nodes: LocalNodes) -> str:
    """What Ray still keeps of ours: placement groups and processors; empty where nothing."""
    script = (
        "import ray, sys, time; ray.init(sys.argv[1], logging_level='ERROR')\n"
        "from ray.util import placement_group_table as table\n"
        "for _ in range(60):\n"
        "    groups = [g['name'] for g in table().values() if g['state'] != 'REMOVED']\n"
        "    total = ray.cluster_resources()['CPU']\n"
        "    taken = total - ray.available_resources().get('CPU', 0)\n"
        "    if not groups and not taken: break\n"
        "    time.sleep(0.25)\n"
        "print('held:', *groups, f'{taken:g} CPU' if taken else '')"
    )
    line = [sys.executable, "-c", script, nodes.address]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    return done.stdout.rpartition("held:")[2].strip()


def late(outcome: Outcome) -> list[str]:
    """What took longer than its target."""
    seen, replaced = TARGETS.get(outcome.fault, (None, None))
    found = []
    if seen is not None and (outcome.seen_s is None or outcome.seen_s > seen):
        found.append(f"seen after {outcome.seen_s} s, not within {seen:g} s")
    if replaced is not None and outcome.placed_s is not None and outcome.seen_s is not None:
        took = outcome.placed_s - outcome.seen_s
        if took > replaced:
            found.append(f"re-placed {took:.1f} s later, not within {replaced:g} s")
    return found


def write_table(outcomes: list[Outcome], origin: dict[str, str]) -> None:
    """Between the two marks of docs/operations.md."""

    def seconds(value: float | None) -> str:
        return "" if value is None else f"{value:.1f} s"

    lines = [
        f"{origin['machine']}, {origin['cores']} cores, {origin['date']}, at {origin['git_sha']}; "
        "the time to serve again is mostly that of starting SGLang.\n",
        "| fault | seen | re-placed | serving again | answered | come again | cut | amiss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in outcomes:
        cells = [one.fault, seconds(one.seen_s), seconds(one.placed_s), seconds(one.serving_s)]
        cells += [str(count) for count in (one.answered, one.turned_away, one.cut)]
        lines.append(f"| {' | '.join(cells)} | {'; '.join(one.problems) or 'nothing'} |")
    text = OPERATIONS.read_text(encoding="utf-8")
    table = MARKS[0] + "\n" + "\n".join(lines) + "\n\n" + MARKS[1]
    pattern = re.escape(MARKS[0]) + ".*" + re.escape(MARKS[1])
    OPERATIONS.write_text(re.sub(pattern, lambda _: table, text, flags=re.DOTALL))


if __name__ == "__main__":
    sys.exit(main())
