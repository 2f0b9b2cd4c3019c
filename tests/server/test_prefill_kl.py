"""Sparse prefill judged by the next tokens that it predicts: KL divergence from keep-all.

The model is random, with attention peaked, so that what a page search overlooks is felt. Two
prompts: one keeps to a topic for a while, as text does, and the other is without order, which is
the worst for any summary of a page.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from torch import Tensor

from tests.servers import Serve, Server
from tests.tiny_llama import VOCABULARY, write_tiny_llama

pytestmark = [pytest.mark.server, pytest.mark.soak]

PAGE = 64
LENGTH = 16_384 + 1
# budget, window and sink are the defaults: from position 3,200 on prefill prunes
CONFIG = {"dense_threshold": 2048}
# the standard deviation of attention logits, over random tokens
PEAK = 3.0
TOPICS = 32
PAGES, ROWS = 32, 8  # 256 positions
# mean KL in nats that balanced may have, the worst position's, and the mean as a share of paper's
BOUNDS = {"topics": (0.05, 0.3, 0.5), "no order": (0.11, 0.4, 1.1)}


@dataclass(frozen=True)
class Divergence:
    mean: float
    worst: float


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("peaked"), peak=PEAK, topics=TOPICS)


def by_topics() -> list[int]:
    """Runs of 40 to 400 tokens, three quarters of them of one topic."""
    generator = random.Random(5)
    size = VOCABULARY // TOPICS
    ids: list[int] = []
    while len(ids) < LENGTH:
        topic = range(generator.randrange(TOPICS) * size, VOCABULARY)[:size]
        for _ in range(generator.randrange(40, 400)):
            of_topic = generator.random() < 0.75
            ids.append(generator.choice(topic) if of_topic else generator.randrange(VOCABULARY))
    return ids[:LENGTH]


def without_order() -> list[int]:
    """Random tokens; half of the time 64 that stood somewhere before are said again."""
    generator = random.Random(5)
    ids: list[int] = []
    while len(ids) < LENGTH:
        if len(ids) > 400 and generator.random() < 0.5:
            start = generator.randrange(len(ids) - 64)
            ids += ids[start : start + 64]
        else:
            ids += [generator.randrange(1, VOCABULARY) for _ in range(64)]
    return ids[:LENGTH]


def positions() -> dict[int, list[int]]:
    """Random rows of random pages, anywhere from where pruning begins."""
    generator = random.Random(6)
    pages = sorted(generator.sample(range(50, LENGTH // PAGE), PAGES))
    return {page: sorted(generator.sample(range(PAGE), ROWS)) for page in pages}


def predictions(server: Server, ids: list[int]) -> Tensor:
    """Log-probabilities of the whole vocabulary at each position: [PAGES * ROWS, VOCABULARY].

    The prompt is read once. Then each page is asked for as the end of a shorter prompt, which
    reads this page anew on top of the cached ones; a page is what is selected for together.
    """
    ask(server, ids, -1)
    rows = []
    for page, wanted in positions().items():
        start = page * PAGE
        # the row of a token predicts the next one, and is listed with that one
        listed = ask(server, ids[: start + PAGE + 1], start)[1:]
        assert len(listed) == PAGE
        rows += [spread(listed[row]) for row in wanted]
    return torch.stack(rows)


def ask(server: Server, ids: list[int], start: int) -> list[list[tuple[float, int, None]]]:
    body = {
        "input_ids": ids,
        "sampling_params": {"temperature": 0, "max_new_tokens": 1},
        "return_logprob": True,
        "logprob_start_len": start,
        "top_logprobs_num": VOCABULARY,
    }
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=600).raise_for_status()
    listed: list[list[tuple[float, int, None]]] = answer.json()["meta_info"]["input_top_logprobs"]
    return listed


def spread(best: Iterable[tuple[float, int, None]]) -> Tensor:
    row = torch.full((VOCABULARY,), float("nan"), dtype=torch.float64)
    for value, token, _ in best:
        row[token] = value
    assert not row.isnan().any()
    return row


def divergence(dense: Tensor, sparse: Tensor) -> Divergence:
    kl = (dense.exp() * (dense - sparse)).sum(-1)
    return Divergence(kl.mean().item(), kl.max().item())


def test_sparse_prefill_predicts_what_keep_all_does(serve: Serve, model: Path) -> None:
    prompts = {"topics": by_topics(), "no order": without_order()}
    found: dict[tuple[str, str], Tensor] = {}
    for preset in ("dense", "balanced", "paper"):
        config = ("--hip-config", json.dumps(CONFIG), "--hip-preset", preset)
        server = serve(*config, model=model)
        found |= {(preset, name): predictions(server, ids) for name, ids in prompts.items()}
    # all are printed before any is judged
    kl = {
        (preset, name): divergence(found["dense", name], found[preset, name])
        for name in prompts
        for preset in ("balanced", "paper")
    }
    for (preset, name), value in kl.items():
        print(f"KL from dense, {name}, {preset}: mean {value.mean:.4f}, worst {value.worst:.3f}")
    for name, (mean, worst, share) in BOUNDS.items():
        ours, paper = kl["balanced", name], kl["paper", name]
        # were nothing pruned, nothing would be measured
        assert 1e-4 < ours.mean < mean, name
        assert ours.worst < worst, name
        assert ours.mean < share * paper.mean, name
