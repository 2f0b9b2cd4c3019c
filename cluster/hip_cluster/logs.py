"""One log for all processes of an endpoint: JSON lines, a request's id on each line about one.

The supervisor writes it. What its ranks print comes through Ray, which would put a prefix before
each line and leave out those that another rank said, too; here a line gets what was known of its
process, and lines of ours pass as they are.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

NAME = "hip_cluster"
# what Ray calls its own way to print what workers print
RAY_PRINTER = "ray_print_logs"


class JsonLines(logging.Formatter):
    """A record as one JSON object, with the keys of smg's log; ``extra={"fields": {...}}`` adds."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "timestamp": _time(record.created),
            "level": record.levelname,
            "message": record.getMessage(),
            "target": record.name,
            "process": record.processName,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def start(process: str) -> None:
    """Log as ``process`` (such as ``supervisor``, ``replica 0 rank 1``) to standard output."""
    multiprocessing.current_process().name = process
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonLines())
    log = logging.getLogger(NAME)
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


def take_over_from_ray() -> None:
    """Print what this job's actors print as JSON lines; call it when Ray is connected."""
    # ray has no public way to print without a prefix
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

    dispatcher.remove_handler(RAY_PRINTER)
    dispatcher.add_handler(NAME, print_lines)


def print_lines(batch: Mapping[str, Any], output: TextIO | None = None) -> None:
    """Print lines of one process: ``batch`` is Ray's, with ``lines``, ``actor_name``, ``ip``..."""
    if batch.get("pid") == "autoscaler":
        # a page about the cluster every five seconds
        return
    for line in batch["lines"]:
        if not line.strip():
            continue
        text = line if _is_json(line) else json.dumps(_wrapped(line, batch), ensure_ascii=False)
        print(text, file=output or sys.stdout, flush=True)


def _wrapped(line: str, batch: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "timestamp": _time(datetime.now().timestamp()),
        "message": line,
        "target": "stderr" if batch.get("is_err") else "stdout",
        "process": batch.get("actor_name") or str(batch.get("pid")),
        "pid": batch.get("pid"),
        "node": batch.get("ip"),
    }


def _is_json(line: str) -> bool:
    if not line.startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
