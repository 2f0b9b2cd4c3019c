"""Attention on a GPU: is every kernel right, and how fast is a layer against dense?

    python benchmarks/gpu/attention.py --out DIRECTORY

Needs torch and Triton, nothing of SGLang, and less than nine minutes. Decode steps are timed in
CUDA graphs over several copies of the KV, so that each finds the L2 cache cold; chunks of a
prefill by CUDA events. What a machine has of FlashInfer, FlashAttention-3, FlashAttention-2 and
torch's own is timed beside; a ratio is the fastest of them, over ours. `--interpret --tiny` is the
dry run: Triton's interpreter on the CPU, whose rows are a file of their own.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if not __package__:
    # run as a script in a checkout where nothing is installed
    sys.path[:1] = [str(ROOT), str(ROOT / "kernels")]
    __package__ = "benchmarks.gpu"


def main(argv: list[str] | None = None) -> int:
    start = time.monotonic()
    args = arguments().parse_args(argv)
    out = args.out or os.environ.get("OUT")
    if not out:
        return refuse("--out DIRECTORY is needed, for the rows (or set OUT)")
    if args.interpret and not args.tiny:
        return refuse("--interpret takes weeks without --tiny")
    if args.interpret:
        # before triton is imported: it decides there
        os.environ["TRITON_INTERPRET"] = "1"
        # numpy's, about the logarithm of nothing
        warnings.filterwarnings("ignore", category=RuntimeWarning)
    elif os.environ.get("TRITON_INTERPRET", "0") != "0":
        return refuse(
            "TRITON_INTERPRET is set, which is no GPU; say --interpret --tiny, or unset it"
        )

    import torch

    if not args.interpret and not torch.cuda.is_available():
        return refuse("no CUDA device is here; --interpret --tiny runs everything on the CPU, dry")
    device = torch.device("cpu" if args.interpret else "cuda", None if args.interpret else 0)
    return measure(args, device, Path(out), start + 60 * args.minutes)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="a directory for the rows and the picture; else $OUT")
    parser.add_argument("--only", choices=["decode", "prefill", "correctness"])
    parser.add_argument("--minutes", type=float, default=8.5, help="start no row after so many")
    parser.add_argument("--dense", help="only these baselines, as sdpa_flash,flashinfer")
    parser.add_argument("--interpret", action="store_true", help="Triton's interpreter, no GPU")
    parser.add_argument("--tiny", action="store_true", help="shapes that the interpreter can do")
    return parser


def measure(args: argparse.Namespace, device: Any, out: Path, deadline: float) -> int:
    from hip_kernels.layout import SUB_PAGES, SparsePlan

    from .correctness import checks, tiny_plan
    from .plot import draw
    from .rows import Rows
    from .sweeps import Sweep, cells

    rows = Rows(out, device)
    say(", ".join(f"{name} {value}" for name, value in rows.origin.items()))
    last = "none"
    try:
        for check in checks(device, args.tiny):
            if not check.passed:
                return fail(f"correctness: {check}")
            last = str(check)
            say(last)
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        return fail(f"correctness: {what}; the last check that passed: {last}")
    if args.only == "correctness":
        return 0
    plan = tiny_plan() if args.tiny else SparsePlan(second_look=2, parts=SUB_PAGES)
    wanted = args.dense.split(",") if args.dense else None
    sweep = Sweep(device, plan, rows, deadline, say, wanted)
    sweep.run(cells(args.only, args.tiny))
    if rows.rows:
        say(f"{len(rows.rows)} rows: {rows.path.name}")
        draw(rows.rows, rows.origin["device"], rows.path.with_suffix(".png"), say)
    if sweep.failures:
        return fail(f"{len(sweep.failures)} rows failed, the first: {sweep.failures[0]}")
    return 0


def say(line: str) -> None:
    print(line, flush=True)


def fail(line: str) -> int:
    print(line, file=sys.stderr)
    return 1


def refuse(line: str) -> int:
    print(line, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
