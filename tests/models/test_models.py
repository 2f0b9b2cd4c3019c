"""The backend under many architectures: log-probabilities against transformers' own."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hip_sglang.config import HipConfig
from hip_sglang.demo.selections import read_trace
from tests.models.architectures import ARCHITECTURES, VOCABULARY, read_model, write_model

SETTINGS = {"sink": 64, "window": 64, "budget": 256, "dense_threshold": 0}
# one prompt whose exact pages hold everything, and one that prunes
WHOLE, PRUNED, NEW = 380, 1500, 8
IN_THE_GATE = "qwen3"


def prompt(length: int) -> list[int]:
    """Tokens in runs, so that keys that are neighbours are alike, as those of a text are."""
    generator, ids = random.Random(length), list[int]()
    while len(ids) < length:
        ids += [generator.randrange(2, VOCABULARY)] * generator.randint(4, 28)
    return ids[:length]


def ask(model: Path, trace: Path) -> list[dict[str, Any]]:
    """What SGLang with hip_attention answers to both prompts, in a process of its own."""
    questions = {
        "engine": {"hip_config": {**SETTINGS, "trace": str(trace)}},
        "prompts": [prompt(WHOLE), prompt(PRUNED)],
        "new": NEW,
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.ask", str(model), json.dumps(questions)],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answers


def errors(model: Any, ids: list[int], answer: dict[str, Any]) -> torch.Tensor:
    """How far each position's log-probabilities are from transformers' -> [positions]."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids + answer["new"]])).logits[0, :-1]
    expected = logits.log_softmax(-1)
    own = expected[: len(ids) - 1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    far = [(torch.tensor(answer["prompt"]) - own).abs()]
    for row, best in zip(expected[len(ids) - 1 :], answer["best"], strict=True):
        values, tokens = zip(*best, strict=True)
        far.append((torch.tensor(values) - row[torch.tensor(tokens)]).abs().amax()[None])
    return torch.cat(far)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.server if name == IN_THE_GATE else pytest.mark.soak)
        for name in ARCHITECTURES
    ],
)
def test_an_architecture_is_served(name: str, tmp_path: Path) -> None:
    directory = write_model(name, tmp_path / name)
    whole, pruned = ask(directory, tmp_path / "trace.jsonl")
    model = read_model(directory)
    start = HipConfig.load(SETTINGS).layer_plan(0).sparse_from
    tolerance = ARCHITECTURES[name].tolerance
    assert start is not None
    assert WHOLE + NEW < start < PRUNED

    # where the exact pages hold the whole context, hip is dense attention
    assert len(whole["best"]) == NEW
    assert errors(model, prompt(WHOLE), whole).amax() < tolerance
    # and so it is at the positions of the longer prompt that see no more than that
    far = errors(model, prompt(PRUNED), pruned)
    assert far[:start].amax() < tolerance

    # the others prune in each layer and head, and what they say is another thing, but near
    assert far[start:].isfinite().all()
    assert 3 * tolerance < far[start:].mean() < ARCHITECTURES[name].near
    steps = [step for request in read_trace(tmp_path / "trace.jsonl").values() for step in request]
    assert [step.layer for step in steps].count(0) == NEW
    assert [step.layer for step in steps].count(1) == NEW
    for step in steps:
        assert len(step.chosen) == ARCHITECTURES[name].kv_heads
        kept = step.sink_pages + step.window_pages + max(map(len, step.chosen))
        assert kept < step.visible_pages


def test_the_document_lists_what_is_tested() -> None:
    rows = [
        f"| `{name}` | {model.heads} / {model.kv_heads} | {width} |"
        for name, model in sorted(ARCHITECTURES.items())
        for width in [model.more.get("head_dim", model.head_dim)]
    ]
    document = Path(__file__).parents[2] / "docs" / "models.md"
    text = document.read_text(encoding="utf-8")
    table = text.split("## Not on a CPU")[0]
    assert [line for line in table.splitlines() if line.startswith("| `")] == rows
