"""What an endpoint of several machines takes: faults, the router, Ray.

Two Ray nodes on this machine, the built-in model. Faults: how soon a death, a hang and a lost node
are seen, and how soon the next attempt has machines (loading the model not counted). Router: the
same short request direct and routed, in turn. Locality: questions on documents over two replicas,
by one router and by two, against the same on one. Ray: TP=2 as Ray actors against TP=2 as SGLang's
processes, in turn.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from hip_cluster.faults import kill_node, kill_rank, stop_rank
from hip_cluster.local import LocalEndpoint, generate, local_endpoint, local_nodes
from hip_cluster.ports import free_port
from hip_cluster.router import command

from hip_sglang.demo.model import write_model
from hip_sglang.demo.server import serve, unwind_on_signals

from .arguments import Parser, at_least
from .rows import save

PARTS = ("faults", "router", "locality", "ray")
SILENCE_S = 5.0
CONTEXT = 16384
CAPACITY = 65536
VOCABULARY = 4000
WARM_UP = 5
QUESTION_TOKENS = 32
RESAMPLES = 2000

Samples = dict[str, list[float]]


def main(argv: list[str]) -> int:
    """Run the parts that were asked for, and print one JSON object in the end."""
    parser = Parser("cluster", __doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help="which of the four")
    parser.add_argument("--requests", type=int, default=100, help="pairs of short requests")
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--questions", type=int, default=10, help="of each document")
    parser.add_argument("--tokens", type=int, default=1024, help="of each document")
    parser.add_argument("--pairs", type=int, default=20, help="of Ray and processes")
    parser.add_output()
    given = parser.parse_args(argv)
    at_least(1, questions=given.questions, documents=given.documents)
    at_least(2, requests=given.requests, pairs=given.pairs)
    parts = given.parts.split(",")
    if wrong := set(parts) - set(PARTS):
        raise ValueError(f"--parts {sorted(wrong)[0]} is not one of {', '.join(PARTS)}")
    samples: Samples = {}
    with unwind_on_signals(), tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_model(folder / "model")
        if "faults" in parts:
            samples |= measure_faults(folder)
        if {"router", "locality"} & set(parts):
            samples |= measure_replicas(folder, given, parts)
        if "ray" in parts:
            samples |= measure_ray(folder, given.pairs)
    config = {
        name: getattr(given, name)
        for name in ("parts", "requests", "documents", "questions", "tokens", "pairs")
    }
    for name, values in samples.items():
        print(f"{name}: {statistics.median(values):.4g} (median of {len(values)})")
    if given.save:
        units = {name: "s" if name.endswith("_s") else "" for name in samples}
        units["router_p50_ms"] = "ms"
        save("cluster", config, {name: (units[name], found) for name, found in samples.items()})
    if given.json:
        print(json.dumps({"bench": "cluster", "config": config, **summary(samples)}))
    return 0


def summary(samples: Samples) -> dict[str, Any]:
    """The ratio of Ray to processes with its interval, and the medians of the rest."""
    values = {name: statistics.median(found) for name, found in samples.items()}
    ratios = {}
    if pairs := samples.get("ray_vs_processes"):
        ratios["ray_vs_processes"] = values.pop("ray_vs_processes")
        values["ray_vs_processes_low"], values["ray_vs_processes_high"] = interval(pairs)
    return {"ratios": ratios, "values": values}


def interval(pairs: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of the median, by resampling."""
    draws = np.random.default_rng(0).choice(np.array(pairs), (RESAMPLES, len(pairs)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(low), float(high)


def document(folder: Path, **more: Any) -> dict[str, Any]:
    """An endpoint of the built-in model behind the router."""
    return {
        "name": "bench",
        "model": {"path": str(folder / "model"), "context_length": CONTEXT},
        "parallel": {"device": "cpu"},
        "memory": {"staging_gib_per_rank": 0.25, "shm_gib": 0.25, "reserve_gib": 0.5},
        "server": {
            "port": free_port("127.0.0.1"),
            "arguments": ["--max-total-tokens", str(CAPACITY), "--sleep-on-idle"],
        },
        "router": {"mode": "managed"},
        "limits": {"silence_s": SILENCE_S, "restarts": 20},
        **more,
    }


def measure_faults(folder: Path) -> Samples:
    """Of TP=2 over two nodes."""
    content = document(folder, parallel={"tp": 2, "nodes": 2, "device": "cpu"})
    with local_nodes((1, 1), folder) as nodes:
        words = ("--address", nodes.address)
        with local_endpoint(content, folder / "faults", *words) as endpoint:
            endpoint.wait_for("SERVING")
            rank = kill_rank(endpoint, None)
            hang = stop_rank(endpoint, None)
            node = kill_node(endpoint, nodes, None)
    for outcome in (rank, hang, node):
        if outcome.problems:
            raise ValueError(f"{outcome.fault}: {'; '.join(outcome.problems)}")
    found = {
        "detect_rank_s": rank.seen_s,
        "detect_hang_s": hang.seen_s,
        "detect_node_s": node.seen_s,
        "recover_s": (rank.placed_s or 0.0) - (rank.seen_s or 0.0),
    }
    return {name: [value] for name, value in found.items() if value is not None}


def measure_replicas(folder: Path, given: Any, parts: list[str]) -> Samples:
    """Of two replicas, one a node."""
    content = document(folder, replicas=2)
    with local_nodes((1, 1), folder) as nodes:
        words = ("--address", nodes.address)
        with local_endpoint(content, folder / "router", *words) as endpoint:
            endpoint.wait_for("SERVING", "SERVING")
            found: Samples = {}
            if "router" in parts:
                found["router_p50_ms"] = router_overhead(endpoint, given.requests)
            if "locality" in parts:
                found |= locality(endpoint, given)
            return found


def router_overhead(endpoint: LocalEndpoint, requests: int) -> list[float]:
    """Milliseconds by which a routed request takes longer: differences of medians of halves."""
    servers = [replica["url"] for replica in endpoint.status()["replicas"]]
    with httpx.Client(timeout=60) as client:

        def ask(url: str) -> float:
            # one token, nothing cached but the first page
            ids = [random.randrange(100, VOCABULARY) for _ in range(8)]
            body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
            began = time.perf_counter()
            client.post(f"{url}/generate", json=body).raise_for_status()
            return 1000 * (time.perf_counter() - began)

        for _ in range(WARM_UP):
            for url in (*servers, endpoint.url):
                ask(url)
        routed, direct = [], []
        for number in range(requests):
            routed.append(ask(endpoint.url))
            direct.append(ask(servers[number % len(servers)]))
    return [statistics.median(routed) - statistics.median(direct)]


def locality(endpoint: LocalEndpoint, given: Any) -> Samples:
    """Cached tokens over two replicas, against the same on one; and how even the load is.

    By the router, by two of them, each with a tree of its own, and by two that hash a prompt's
    beginning instead, and so agree.
    """
    servers = [replica["url"] for replica in endpoint.status()["replicas"]]
    cached_alone, _ = ask_documents(servers[:1], given, seed=1)
    found: Samples = {}

    def measure(name: str, urls: list[str], seed: int) -> None:
        cached, tokens = ask_documents(urls, given, seed)
        found[f"prefix_hit_share{name}"] = [cached / cached_alone]
        found[f"imbalance{name}"] = [max(tokens.values()) / (sum(tokens.values()) / len(servers))]

    measure("", [endpoint.url], seed=2)
    tree = endpoint.spec.router.policy
    with another_router(endpoint, servers, tree) as other:
        measure("_two_routers", [endpoint.url, other], seed=3)
    with (
        another_router(endpoint, servers, "prefix_hash") as one,
        another_router(endpoint, servers, "prefix_hash") as other,
    ):
        measure("_two_hashing", [one, other], seed=4)
    return found


@contextmanager
def another_router(endpoint: LocalEndpoint, servers: list[str], policy: str) -> Iterator[str]:
    """One before the same replicas, which nobody tells of the first."""
    port = free_port("127.0.0.1")
    spec = endpoint.spec.model_copy(
        update={
            "server": endpoint.spec.server.model_copy(update={"port": port}),
            "router": endpoint.spec.router.model_copy(update={"policy": policy}),
        }
    )
    line = command(spec, free_port("127.0.0.1"), servers)
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
    try:
        while time.monotonic() < deadline:
            with suppress(httpx.TransportError):
                if httpx.get(f"{url}/readiness").status_code == 200:
                    break
            time.sleep(0.1)
        yield url
    finally:
        process.kill()
        process.wait()


def ask_documents(urls: list[str], given: Any, seed: int) -> tuple[int, Counter[str]]:
    """Questions in random order: cached tokens in all, and tokens by the replica that read them."""
    chance = random.Random(seed)
    documents = [
        [chance.randrange(100, VOCABULARY) for _ in range(given.tokens)]
        for _ in range(given.documents)
    ]
    asked = [document for document in documents for _ in range(given.questions)]
    chance.shuffle(asked)
    cached, tokens = 0, Counter[str]()
    with httpx.Client(timeout=300) as client:
        for document in asked:
            question = [chance.randrange(100, VOCABULARY) for _ in range(QUESTION_TOKENS)]
            body = {
                # the router sees the text of a prompt, and not its tokens
                "text": " ".join(map(str, document + question)),
                "sampling_params": {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True},
            }
            url = chance.choice(urls)
            answer = client.post(f"{url}/generate", json=body).raise_for_status()
            meta = answer.json()["meta_info"]
            cached += meta["cached_tokens"]
            server = answer.headers.get("x-smg-routed-worker-id", url)
            tokens[server] += meta["prompt_tokens"] - meta["cached_tokens"]
    return cached, tokens


def measure_ray(folder: Path, pairs: int) -> Samples:
    """How much faster than processes (over 1) Ray's actors are, pair by pair."""
    common = ["--max-total-tokens", str(CAPACITY), "--context-length", str(CONTEXT)]
    common += ["--sleep-on-idle"]
    plain = ["--model-path", str(folder / "model"), "--attention-backend", "hip_attention"]
    content = document(folder, parallel={"tp": 2, "device": "cpu"})
    with local_nodes((2,), folder) as nodes:
        words = ("--address", nodes.address)
        with (
            serve([*plain, *common, "--tp-size", "2"], folder / "plain.log") as server,
            local_endpoint(content, folder / "ray", *words) as endpoint,
        ):
            endpoint.wait_for("SERVING")
            actors = endpoint.status()["replicas"][0]["url"]
            ratios = interleaved(lambda: run_once(server.url), lambda: run_once(actors), pairs)
    return {"ray_vs_processes": ratios}


def run_once(url: str) -> float:
    """Seconds of a prompt that is read cold, and of some tokens after it."""
    ids = [random.randrange(100, VOCABULARY) for _ in range(2048)]
    began = time.perf_counter()
    generate(url, ids, 64)
    return time.perf_counter() - began


def interleaved(one: Callable[[], float], other: Callable[[], float], pairs: int) -> list[float]:
    """one / other, pair by pair, the first in turn."""
    one()
    other()
    ratios = []
    for number in range(pairs):
        if number % 2:
            late, early = other(), one()
            ratios.append(early / late)
        else:
            ratios.append(one() / other())
    return ratios
