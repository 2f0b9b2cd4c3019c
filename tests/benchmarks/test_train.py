"""Lessons whose context decides what they count, and a model that is trained on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hip_sglang.bench import load_bench
from hip_sglang.demo.vocabulary import Tokenizer, train_tokenizer
from hip_sglang.tune.judge import plans_of
from hip_sglang.tune.teacher import Teacher

mixture = load_bench("train.mixture")
recipe = load_bench("train.recipe")
run = load_bench("train.run")
texts = load_bench("train.texts")
LENGTHS = (64, 300, 2048)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(texts.learned()[:20], 1024)


@pytest.fixture
def lessons(tokenizer: Tokenizer) -> Any:
    return mixture.Mixture(tokenizer, texts.learned()[:20], seed=3)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("kind", mixture.KINDS)
def test_a_lesson_fills_its_length(lessons: Any, kind: str, tokens: int) -> None:
    asked = 0
    for _ in range(20):
        ids, counted = lessons.lesson(kind, tokens)
        assert ids.shape == counted.shape == (tokens,)
        assert ids.min() >= 0
        asked += int(counted.sum())
    assert asked


@pytest.mark.parametrize("tokens", LENGTHS)
def test_what_is_copied_stood_before(lessons: Any, tokens: int) -> None:
    for _ in range(20):
        ids, counted = lessons.lesson("copy", tokens)
        (places,) = np.nonzero(counted)
        again = ids[places[0] - 1 : places[-1] + 1]
        assert stands_in(ids[: places[0] - 1], again)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_a_key_has_one_value(lessons: Any, tokens: int) -> None:
    for _ in range(20):
        ids, counted = lessons.lesson("recall", tokens)
        (places,) = np.nonzero(counted)
        told = ids[: places[0] - 1].reshape(-1, 2)
        value = dict(told.tolist())
        assert len(value) == len(told)
        assert [value[key] for key in ids[places - 1].tolist()] == ids[places].tolist()


@pytest.mark.parametrize("tokens", LENGTHS)
def test_a_needle_that_is_asked_for_is_there(lessons: Any, tokens: int) -> None:
    for _ in range(20):
        ids, counted = lessons.lesson("needle", tokens)
        ends = np.flatnonzero(counted & ~np.append(counted[1:], False))
        starts = np.flatnonzero(counted & ~np.append(False, counted[:-1]))
        for start, end in zip(starts, ends, strict=True):
            # two tokens of its key at least
            assert stands_in(ids[: starts[0] - 2], ids[start - 2 : end + 1])


def test_a_chain_of_names_ends_at_its_value(lessons: Any) -> None:
    for _ in range(20):
        ids, counted = lessons.lesson("variables", 512)
        (places,) = np.nonzero(counted)
        told = {}
        for at in np.flatnonzero(ids[: places[0] - 2] == 1):
            told[int(ids[at - 1])] = int(ids[at + 1])
        for place in places:
            name = int(ids[place - 2])
            hops = 0
            while name in told:
                name, hops = told[name], hops + 1
            assert name == ids[place]
            assert hops >= 2


@pytest.mark.parametrize("tokens", LENGTHS)
def test_a_code_was_told(lessons: Any, tokenizer: Tokenizer, tokens: int) -> None:
    found = (lessons.lesson("codes", tokens) for _ in range(20))
    # a short one may have no room for a question
    ids, counted = next((ids, counted) for ids, counted in found if counted.any())
    first = int(np.flatnonzero(counted)[0])
    told = tokenizer.decode(ids[:first].tolist()).split("The code of ")
    asked = tokenizer.decode(ids[first:].tolist()).partition(".\n")[0]
    assert sum(line.endswith(f"is{asked}.\n") for line in told) == 1


def stands_in(where: np.ndarray, what: np.ndarray) -> bool:
    windows = np.lib.stride_tricks.sliding_window_view(where, len(what))
    return bool((windows == what).all(1).any())


@pytest.mark.slow
def test_the_same_seed_trains_the_same_model(tmp_path: Path) -> None:
    known = texts.learned()[:20]
    stages = (recipe.Stage(32, 8, 60), recipe.Stage(64, 4, 40))
    small = recipe.Recipe(
        layers=1, width=32, heads=2, kv_heads=1, inner=64, vocabulary=512, theta=1e4, rate=3e-3,
        stages=stages,
    )  # fmt: skip
    for name in ("one", "two"):
        run.train(small, tmp_path / name, 7, known[:15], known[15:])
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    log = [json.loads(line) for line in (tmp_path / "one" / run.LOG).read_text().splitlines()]
    assert log[0]["recipe"]["stages"][1]["tokens"] == 64
    losses = [row["loss"] for row in log[1:-1]]
    assert losses[-1] < losses[0]
    assert 1 < log[-1]["perplexity"] < 512
    teacher = Teacher(tmp_path / "one")
    from hip_sglang.config import HipConfig

    assert teacher.read([1, 2, 3], plans_of(HipConfig(preset="dense"), teacher), 1).tokens == 3


def test_what_is_held_out_is_not_learned() -> None:
    seen, held_out = texts.learned(), texts.held_out()
    assert not set(seen) & set(held_out)
    share = sum(map(len, held_out)) / sum(map(len, seen))
    assert 0.05 < share < 0.2
