"""Many machines, the demo, and the slow lane."""

from __future__ import annotations

import csv
import json
from typing import Any

from .saved import file_of, runs, table, where


def cluster_section() -> list[str]:
    if not (found := runs("cluster")):
        return []
    words = {
        "detect_rank_s": "a rank killed, until no client is sent to its group (s)",
        "detect_hang_s": "a rank stopped, until then (s; it is silent for 5 s before)",
        "detect_node_s": "a node killed, until then (s)",
        "recover_s": "from then until the group has machines again, the model not yet loaded (s)",
        "router_p50_ms": "a short request through the router against one direct (ms)",
        "prefix_hit_share": "cached tokens over two replicas against one (share)",
        "imbalance": "tokens read by the busier of the two against the mean",
        "prefix_hit_share_two_routers": "the same share with two routers, each with its own tree",
        "imbalance_two_routers": "and what the busier replica reads then",
        "prefix_hit_share_two_hashing": "the share with two routers that hash (`prefix_hash`)",
        "imbalance_two_hashing": "and what the busier replica reads then",
        "ray_vs_processes": "TP=2 as SGLang's processes against TP=2 as Ray actors, time",
    }
    rows = [
        [words[name], *(f"{float(row[part]):.3g}" for part in ("p20", "p50", "p80")), where(row)]
        for _, _, metrics in found
        for name, row in metrics.items()
    ]
    return [
        "## Many machines",
        "`hip-sglang bench cluster`: Ray nodes on one machine, the built-in model. A time over one "
        "is better for Ray in the last line.",
        table(["what", "p20", "p50", "p80", "where"], rows),
    ]


def demo() -> dict[str, Any]:
    report: dict[str, Any] = json.loads(file_of("demo.json").read_text(encoding="utf-8"))
    return report


def demo_words() -> str:
    machine = demo()["provenance"]["machine"]
    return (
        f"`make demo` on {machine['cores']} cores of an {machine['processor']}"
        f"{', no GPU' if machine['accelerator'] is None else ''}; one request alone:"
    )


def demo_table() -> str:
    rows = [
        [
            run["name"],
            f"{run['context'] // 1024}K",
            f"{run['quotes_right']} of {run['quotes']}",
            f"{run['ttft_s']:.0f} s",
            f"{run['decode_tokens_per_s']:.1f}",
            f"{run['kv_read_share']:.1%}",
        ]
        for run in demo()["runs"]
    ]
    head = ["attention", "context", "quotes right", "first token", "tokens/s", "KV read a step"]
    return table(head, rows)


def soak_table() -> str:
    with file_of("soak.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return table(list(rows[0]), [list(row.values()) for row in rows])
