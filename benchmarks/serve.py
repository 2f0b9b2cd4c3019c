"""How long until the first token, and how fast then, on the real server?

The built-in retrieval model reads a document cold and continues a quote from it: HiP against our
keep-all, which is the same code with nothing pruned. Two servers are alive and one is busy: each
round asks both, the first in turn, so that what the machine does meanwhile falls on both. An idle
server sleeps; both together hold 8 KiB a token. Each round begins with an empty radix cache. On a
GPU one server has it to itself, and then the next; `--model` names a directory of weights and
`tokenizer.json` in place of the built-in model, and `--sglang` adds the attention backend that
SGLang chooses by itself.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from hip_sglang.config import HipConfig
from hip_sglang.demo.architecture import MAX_POSITION
from hip_sglang.demo.corpus import Document
from hip_sglang.demo.model import write_model
from hip_sglang.demo.program import Speed, measure_speed
from hip_sglang.demo.quotes import pick_quotes
from hip_sglang.demo.server import serve, unwind_on_signals
from hip_sglang.demo.vocabulary import load_tokenizer

from .arguments import Parser, at_least, given_of
from .retrieval import library_document
from .rows import percentiles, save

# what a CPU server reads at once; shorter prompts say nothing about reading
CHUNK = 4096
# tokens of a prompt after the document: a quote
_ROOM = 64
# tokens of KV beside one context
SPARE = 8192
# long enough that the default configuration prunes
_WARM_UP_TOKENS = 12288
# how a benchmark's own threads are tuned is not how a server's should be
TUNING = ("OMP_", "GOMP_", "KMP_", "MKL_")
HIP = ("--attention-backend", "hip_attention")

Samples = dict[str, list[Speed]]


@dataclass(frozen=True)
class Prompts:
    """What the servers of one context are asked."""

    context: int
    document: Document
    suffix: str  # a quote that follows the document
    warm_up: str  # the document's beginning
    new: int

    @classmethod
    def make(cls, model: Path, context: int, new: int) -> Prompts:
        """Raises ValueError where Python's library is shorter than the context."""
        tokenizer = load_tokenizer(model)
        document = library_document(tokenizer, context - _ROOM - new)
        (quote,) = pick_quotes(document, tokenizer, 1)
        warm_up = Document.cut(document.text, tokenizer, min(_WARM_UP_TOKENS, context // 2))
        return cls(context, document, quote.suffix, warm_up.text, new)


class Contestant:
    """One running server, ready to be measured again and again."""

    def __init__(self, url: str, prompts: Prompts) -> None:
        self.url, self._prompts = url, prompts
        text = prompts.warm_up
        measure_speed(url, text, text + prompts.suffix, answers=1)

    def measure(self) -> Speed:
        """One cold reading, and the median decode speed of three answers behind it."""
        # it waits for the request before to end
        httpx.post(f"{self.url}/flush_cache?timeout=30", timeout=60).raise_for_status()
        text = self._prompts.document.text
        prompt = text + self._prompts.suffix
        return measure_speed(self.url, text, prompt, tokens=self._prompts.new)


def run(
    ways: dict[str, tuple[str, ...]], prompts: Prompts, model: Path, folder: Path, rounds: int
) -> Samples:
    """Measurements by name, one a round; all servers are gone afterwards."""
    if not torch.cuda.is_available():
        return run_rounds(ways, prompts, model, folder, rounds)
    # a server takes its share of what the GPU has
    found: Samples = {}
    for name, arguments in ways.items():
        found |= run_rounds({name: arguments}, prompts, model, folder, rounds)
    return found


def run_rounds(
    ways: dict[str, tuple[str, ...]], prompts: Prompts, model: Path, folder: Path, rounds: int
) -> Samples:
    """Measurements by name of servers that are alive together."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(TUNING)}
    with ExitStack() as stack:
        contestants = {}
        for name, arguments in ways.items():
            common = (
                *("--model-path", str(model)),
                *("--context-length", str(prompts.context)),
                *("--max-total-tokens", str(prompts.context + SPARE)),
                "--sleep-on-idle",
            )
            server = serve((*common, *arguments), folder / f"{name}.log", environment)
            contestants[name] = Contestant(stack.enter_context(server).url, prompts)
        found: Samples = {name: [] for name in ways}
        order = list(ways)
        for number in range(1, rounds + 1):
            for name in order:
                speed = contestants[name].measure()
                found[name].append(speed)
                print(
                    f"round {number}, {name}: {speed.prompt_tokens:,} tokens, first token after "
                    f"{speed.ttft_s:.2f} s, then {speed.decode_tokens_per_s:.1f} tokens/s",
                    flush=True,
                )
            order.reverse()
    return found


def ratios(samples: Samples) -> dict[str, list[float]]:
    """How many times faster than keep-all we were, and than SGLang by itself, round by round."""
    found = {}
    for name, suffix in (("keep_all", ""), ("sglang", "_sglang")):
        pairs = list(zip(samples["ours"], samples.get(name, []), strict=False))
        if pairs:
            found[f"ttft{suffix}"] = [other.ttft_s / ours.ttft_s for ours, other in pairs]
            found[f"decode{suffix}"] = [
                ours.decode_tokens_per_s / other.decode_tokens_per_s for ours, other in pairs
            ]
    return found


@contextmanager
def workspace() -> Iterator[Path]:
    """A folder for the model and the servers' logs; left behind where an error names a log."""
    folder, keep = Path(tempfile.mkdtemp(prefix="hip-sglang-bench-")), False
    try:
        yield folder
    except ChildProcessError:
        keep = True
        raise
    finally:
        if not keep:
            shutil.rmtree(folder)


def main(argv: list[str]) -> int:
    parser = Parser("serve", __doc__)
    parser.add_argument("--context", type=int, default=65536, help="tokens, the new ones included")
    parser.add_argument("--new", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hip-config", help="JSON text or a path")
    parser.add_argument("--model", type=Path, metavar="DIR", help="instead of the built-in model")
    parser.add_argument(
        "--sglang", action="store_true", help="also the backend that SGLang chooses by itself"
    )
    parser.add_argument(
        "--torch-native", type=int, metavar="CONTEXT",
        help="also SGLang's torch_native, at a context that it can bear: values, no ratio",
    )  # fmt: skip
    parser.add_output()
    args = parser.parse_args(argv)
    at_least(1, rounds=args.rounds)
    at_least(2, new=args.new)
    contexts = {"context": args.context}
    if args.torch_native is not None:
        contexts["torch_native"] = args.torch_native
    for name, context in contexts.items():
        at_least(CHUNK, **{name: context})
        if args.model is None and context > MAX_POSITION:
            raise ValueError(
                f"--{name.replace('_', '-')} {context}: the built-in model has "
                f"{MAX_POSITION:,} positions"
            )
        if args.new > context // 2:
            raise ValueError(f"--new {args.new}: give at most half of the context, {context:,}")
    if args.model is not None and not (args.model / "tokenizer.json").is_file():
        raise ValueError(
            f"--model {args.model}: there is no tokenizer.json; give the directory of a model"
        )
    config = HipConfig.load(args.hip_config)
    given = () if args.hip_config is None else ("--hip-config", args.hip_config)

    with unwind_on_signals(), workspace() as folder:
        model = args.model or folder / "model"
        if args.model is None:
            write_model(model)
        prompts = Prompts.make(model, args.context, args.new)
        ways = {"ours": (*HIP, *given), "keep_all": (*HIP, "--hip-preset", "dense")}
        if args.sglang:
            ways["sglang"] = ()
        samples = run(ways, prompts, model, folder, args.rounds)
        if args.torch_native is not None:
            shorter = Prompts.make(model, args.torch_native, args.new)
            native = {"torch_native": ("--attention-backend", "torch_native")}
            samples |= run(native, shorter, model, folder, args.rounds)

    shape = {
        "context": args.context, "new": args.new, "rounds": args.rounds,
        "torch_native": args.torch_native,
        "model": args.model.name if args.model else "built-in",
        "hip": given_of(config),
    }  # fmt: skip
    report(shape, samples, as_json=args.json, keep=args.save)
    return 0


def report(shape: dict[str, Any], samples: Samples, *, as_json: bool, keep: bool) -> None:
    """Print medians over rounds, and keep the rows."""
    rows = {f"ratio.{name}": ("x", found) for name, found in ratios(samples).items()}
    for name, speeds in samples.items():
        rows[f"{name}.ttft"] = ("s", [speed.ttft_s for speed in speeds])
        rows[f"{name}.decode"] = ("tokens/s", [speed.decode_tokens_per_s for speed in speeds])
    middle = {metric: percentiles(found)[1] for metric, (_, found) in rows.items()}
    for metric, (unit, found) in rows.items():
        low, _, high = percentiles(found)
        print(f"{metric:20s} {middle[metric]:9.2f} {unit}   (p20 {low:.2f}, p80 {high:.2f})")
    if keep:
        print(f"saved to {save('serve', shape, rows).name}", file=sys.stderr)
    if as_json:
        values = {"prompt_tokens": float(samples["ours"][0].prompt_tokens)}
        for name in samples:
            values[f"{name}_ttft_s"] = round(middle[f"{name}.ttft"], 3)
            values[f"{name}_decode_tokens_per_s"] = round(middle[f"{name}.decode"], 2)
        medians = {name: round(middle[f"ratio.{name}"], 2) for name in ratios(samples)}
        print(json.dumps({"bench": "serve", "config": shape, "ratios": medians, "values": values}))
