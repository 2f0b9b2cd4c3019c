"""``python -m benchmarks``: every benchmark by one command, and against another commit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
GPU = "gpu/attention.py"
EVAL = "eval"  # a command of its own

Plan = list[tuple[str, list[str]]]
# what docs/algorithm.md compares
REMAINDERS = [
    "{}",
    '{"remainder": "none"}',
    '{"remainder": "mean"}',
    '{"remainder": "quadratic"}',
    '{"remainder": "log_cosh"}',
    '{"remainder": "log_i0"}',
    '{"sub_page_means": false}',
    '{"second_look": 0}',
    '{"second_look": 0, "remainder": "none"}',
]
# every page, and through nodes
BEAMS = ["{}", *(f'{{"node_threshold": 131072, "beam": {2**n}}}' for n in (16, 15, 14, 13))]
# prunes contexts of 4,096 tokens to an eighth
SHORT = '{"dense_threshold": 0, "window": 128, "budget": 256}'
FAR_AND_NEAR = (16384, 32768, 65536, 131072)
LOOKS = ["{}", '{"second_look": 1}', '{"second_look": 0}', '{"preset": "paper"}']
# pages of 64 are a handful at this length: 16 first, where everything is a share of the context
METHODS = [
    *(["--page-size", "16", "--share", share] for share in ("0.03125", "0.0625", "0.125", "0.25")),
    *(["--page-size", size, "--seed", seed] for size in ("16", "64") for seed in ("1", "4")),
    ["--page-size", "32"],
    *(["--page-size", "64", "--share", share] for share in ("0.0625", "0.125", "0.25")),
    # as many tokens at any length
    *(["--page-size", "16", "--context", f"{256 * n}", "--share", f"{1 / n}"] for n in (4, 8)),
    ["--page-size", "16", "--contest", "ablation"],
    ["--page-size", "16", "--own-prefill"],
    ["--page-size", "16", "--whole"],
    *(
        ["--page-size", "16", "--task", "multikey2", "--documents", documents, "--share", share]
        for documents, share in (("500", "0.125"), ("60", "0.0625"), ("60", "0.25"))
    ),
]
# no more tokens than the default configuration attends exactly
DEFAULT = 64 + 1024 + 2048
EVALUATIONS = [
    ("quotes,needle,multikey2", "4096", "20", ["--hip-config", SHORT]),
    ("quotes,needle_context", "4096,16384,65536,131072", "10", []),
    ("needle", "16384", "10", []),
    ("needle", "65536", "3", []),
]
PROFILES: dict[str, Plan] = {
    # small shapes: whether all of them work
    "quick": [
        ("attention", ["--context", "32768", "--rounds", "5"]),
        ("growth", ["--lengths", "64K,256K", "--prompts", "16K,64K", "--rounds", "5"]),
        ("fidelity", ["--seeds", "2", "--length", "8192"]),
        ("methods", ["--documents", "3"]),
        ("serve", ["--context", "16384", "--rounds", "1"]),
    ],
    # the rows of docs/numbers.md
    "cpu": [
        ("attention", ["--context", "131072"]),
        ("attention", ["--context", "1048576", "--rounds", "5"]),
        ("attention", ["--mode", "prefill", "--context", "131072", "--rounds", "3"]),
        ("growth", []),
        *(("fidelity", ["--hip-config", config]) for config in REMAINDERS),
        *(
            ("fidelity", ["--length", "262144", "--seeds", "5", "--hip-config", config])
            for config in BEAMS
        ),
        (
            "fidelity",
            [
                *("--seeds", "0", "--model", "--context", *map(str, FAR_AND_NEAR)),
                *(f"--hip-config={config}" for config in LOOKS),
            ],
        ),
        *(("methods", ["--model", "trained", "--documents", "20", *more]) for more in METHODS),
        *(("tuning", ["--model", "trained", "--page-size", size]) for size in ("64", "16")),
        *(
            ("methods", ["--task", task, "--context", "16384", "--documents", "10"])
            for task in ("quotes", "needle", "needle_context")
        ),
        *(
            (
                "methods",
                ["--task", task, "--documents", "10", f"--context={n}", f"--share={DEFAULT / n}"],
            )
            for n in (16384, 65536)
            for task in ("quotes", "needle_context")
        ),
        ("methods", ["--task", "needle", "--documents", "20", "--own-prefill"]),
        *(
            (EVAL, ["--tasks", tasks, "--lengths", lengths, "--samples", samples, *more])
            for tasks, lengths, samples, more in EVALUATIONS
        ),
        ("serve", ["--context", "65536"]),
        ("offload", []),
        ("prefix", []),
        ("cluster", []),
    ],
    "gpu": [(GPU, [])],
}
ROUNDS = 2

app = typer.Typer(help=__doc__, add_completion=False)


@app.command()
def run(
    name: Annotated[str, typer.Argument(help="One of the profile's, or all.")],
    profile: Annotated[str, typer.Option(help=", ".join(PROFILES))] = "quick",
) -> None:
    """Run the benchmarks of a profile, one after the other; rows of quick are not kept."""
    console, failed = Console(), 0
    keep = ["--save"] if profile != "quick" else []
    for bench, arguments in chosen(name, profile):
        console.rule(f"{bench} {' '.join(arguments)}")
        began = time.monotonic()
        more = ["--out", str(ROOT / "benchmarks" / "results")] if bench == GPU else keep
        with command(bench) as program:
            code = subprocess.run([*program, *arguments, *more], cwd=ROOT, check=False).returncode
        console.print(f"{bench}: exit code {code} after {time.monotonic() - began:.0f} s")
        failed += code != 0
    raise typer.Exit(1 if failed else 0)


@app.command()
def compare(
    ref: Annotated[str, typer.Argument(help="A commit of this repository.")],
    name: Annotated[str, typer.Argument(help="One of the profile's, or all.")] = "attention",
    profile: Annotated[str, typer.Option(help=", ".join(PROFILES))] = "quick",
) -> None:
    """Run the same benchmarks on another commit and here, in turn, and show what changed."""
    if profile == "gpu":
        raise typer.BadParameter("--profile gpu: its benchmark is not compared; choose another")
    table = Table("benchmark", "value", ref, "here", "here / there")
    with checked_out(ref) as other:
        for bench, arguments in chosen(name, profile):
            found: dict[Path, list[dict[str, float]]] = {other: [], ROOT: []}
            try:
                for turn in range(ROUNDS):
                    for place in (other, ROOT) if turn % 2 == 0 else (ROOT, other):
                        found[place].append(values_of(bench, arguments, place))
            except subprocess.CalledProcessError:
                print(f"{bench} {' '.join(arguments)} is left out: it ended with an error")
                continue
            for value in found[ROOT][0]:
                there, here = (
                    [one[value] for one in found[place] if value in one] for place in (other, ROOT)
                )
                if there and here:
                    before, after = median(there), median(here)
                    ratio = f"{after / before:.2f}" if before else "-"
                    table.add_row(bench, value, f"{before:.4g}", f"{after:.4g}", ratio)
    Console().print(table)


@app.command()
def report(
    check: Annotated[bool, typer.Option("--check", help="Only say what is stale.")] = False,
) -> None:
    """Rewrite docs/numbers.md, and what else shows numbers, from the rows; draw the figures."""
    from .numbers import stale
    from .numbers.figures import draw_guards, draw_methods

    found = stale()
    for path, text in found.items():
        print(f"{path.relative_to(ROOT)} {'is stale; run `make numbers`' if check else 'written'}")
        if not check:
            path.write_text(text, encoding="utf-8")
    if not check:
        draw_guards(ROOT / "docs" / "guard.png")
        draw_methods(ROOT / "docs" / "methods.png")
    raise typer.Exit(1 if check and found else 0)


def chosen(name: str, profile: str) -> Plan:
    """The benchmarks of that name in a profile."""
    if profile not in PROFILES:
        raise typer.BadParameter(f"--profile {profile}: choose one of {', '.join(PROFILES)}")
    plan = [(bench, more) for bench, more in PROFILES[profile] if name in ("all", bench)]
    if not plan:
        names = sorted({bench for bench, _ in PROFILES[profile]})
        raise typer.BadParameter(f"{name} is not in profile {profile}; it has {', '.join(names)}")
    return plan


@contextmanager
def command(bench: str) -> Iterator[list[str]]:
    """Its program; answers of an evaluation are not kept, for another commit would take them."""
    # of whatever commit is first on the path
    program = [sys.executable, "-c", "from hip_sglang.cli import main; main()"]
    with tempfile.TemporaryDirectory() as folder:
        if bench == GPU:
            yield [sys.executable, str(ROOT / "benchmarks" / GPU)]
        elif bench == EVAL:
            yield [*program, EVAL, "--out", folder]
        else:
            yield [*program, "bench", bench]


def values_of(bench: str, arguments: list[str], place: Path) -> dict[str, float]:
    """What a benchmark says in its last line, numbers only, by path."""
    paths = [str(place / part) for part in ("", "kernels", "cluster")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with command(bench) as program:
        done = subprocess.run(
            [*program, *arguments, "--json"],
            cwd=place,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    told = json.loads(done.stdout.strip().splitlines()[-1])
    return dict(numbers({key: told.get(key, {}) for key in ("ratios", "values")}))


def numbers(of: dict[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    for key, value in of.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{before}{key}.")
        elif isinstance(value, (int, float)):
            yield f"{before}{key}", float(value)


@contextmanager
def checked_out(ref: str) -> Iterator[Path]:
    """A commit in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "there"
        git = ["git", "-C", str(ROOT), "worktree"]
        done = subprocess.run(
            [*git, "add", "--detach", str(place), ref], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise typer.BadParameter(f"{ref}: {done.stderr.strip().splitlines()[-1]}")
        try:
            yield place
        finally:
            subprocess.run([*git, "remove", "--force", str(place)], check=False)


if __name__ == "__main__":
    app()
