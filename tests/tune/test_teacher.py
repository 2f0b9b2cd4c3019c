"""What a teacher says under our attention, against transformers' own, and step by step."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch

from hip_sglang.config import HipConfig
from hip_sglang.tune.pruned import Pruned
from hip_sglang.tune.teacher import Teacher, divergence
from tests.tiny_llama import VOCABULARY, write_tiny_llama

STEPS = 70
SPARSE = {"sink": 64, "window": 64, "budget": 128, "dense_threshold": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("teacher"), peak=3.0, topics=16)


@pytest.fixture(scope="module")
def teacher(model: Path) -> Teacher:
    return Teacher(model)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    chance = random.Random(1)
    return [chance.randrange(1, VOCABULARY) for _ in range(1500)]


def pruned(teacher: Teacher, **config: object) -> Pruned:
    settings = HipConfig.load(config)
    return Pruned([settings.layer_plan(layer) for layer in range(teacher.layers)])


def test_with_every_page_kept_it_says_what_the_model_says(
    teacher: Teacher, model: Path, ids: list[int]
) -> None:
    dense = pruned(teacher, preset="dense")
    document = teacher.read(ids[:-STEPS], dense, STEPS)
    found = teacher.ask(document, ids[-STEPS:], dense)
    # what makes transformers importable beside this torch is done by then
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(torch.tensor([ids])).logits[0, -STEPS:]
    torch.testing.assert_close(found, logits.log_softmax(-1), rtol=0, atol=1e-4)
    assert dense.share_read == 1


def test_steps_that_are_asked_together_are_those_asked_one_by_one(
    teacher: Teacher, ids: list[int]
) -> None:
    sparse = pruned(teacher, **SPARSE)
    document = teacher.read(ids[:-STEPS], sparse, STEPS)
    together = teacher.ask(document, ids[-STEPS:], sparse)
    # what a step wrote stays where it is
    for at, token in enumerate(ids[-STEPS:]):
        alone = teacher.ask(document, [token], sparse)
        torch.testing.assert_close(alone[0], together[at], rtol=0, atol=1e-4)
        document.tokens += 1
    dense = pruned(teacher, preset="dense")
    document = teacher.read(ids[:-STEPS], dense, STEPS)
    apart = divergence(teacher.ask(document, ids[-STEPS:], dense), together)
    assert float(apart.mean()) > 1e-4


def test_a_document_is_read_on_from_what_two_have_in_common(
    teacher: Teacher, ids: list[int]
) -> None:
    dense, sparse = pruned(teacher, preset="dense"), pruned(teacher, **SPARSE)
    other = [*ids[:777], *ids[200:850]]
    document = teacher.read(ids[:-STEPS], dense, STEPS)
    # pages that were summarised are summarised again
    teacher.read_on(document, 777, other[777:], dense)
    assert document.tokens == len(other)
    anew = teacher.read(other, dense, STEPS)
    found, expected = (teacher.ask(one, ids[-STEPS:], sparse) for one in (document, anew))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_choice_is_used_again_until_the_length_divides(
    teacher: Teacher, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hip_sglang.tune import pruned as module

    seen: list[tuple[list[int], bool]] = []
    attend = module.attend

    def spy(query, kv, summaries, block, *others, choice=None):  # type: ignore[no-untyped-def]
        lengths = sorted((block.position.flatten() + 1).tolist())
        seen.append((lengths, choice is not None))
        return attend(query, kv, summaries, block, *others, choice=choice)

    sparse = pruned(teacher, **SPARSE, refresh=8)
    document = teacher.read(ids[:-20], sparse, 20)
    monkeypatch.setattr(module, "attend", spy)
    teacher.ask(document, ids[-20:], sparse)
    fresh, again = seen[:2]
    # the first step after a prompt chooses, too
    assert fresh == ([1481, 1488, 1496], False)
    assert again == ([n for n in range(1482, 1501) if n % 8], True)
    assert len(seen) == 2 * teacher.layers


def test_what_a_step_reads_is_counted_in_bytes(teacher: Teacher, ids: list[int]) -> None:
    sparse = pruned(teacher, **SPARSE)
    document = teacher.read(ids[:1024], sparse, 1)
    teacher.ask(document, ids[1024:1025], sparse)
    plan = sparse.plans[0]
    # sink, window and its own page, and the budget
    assert sparse.share_read == pytest.approx(plan.share_read(16, 5))
    less = pruned(teacher, **SPARSE, dense_layers=[0, 1])
    teacher.ask(document, ids[1024:1025], less)
    assert less.share_read == pytest.approx((1 + sparse.share_read) / 2)


def test_the_divergence_is_that_of_kullback_and_leibler() -> None:
    p, q = torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([[0.25, 0.75], [0.25, 0.75]])
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert divergence(p.log(), q.log()).tolist() == pytest.approx([expected, 0], abs=1e-6)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no model to load"):
        Teacher(tmp_path)
