"""Tasks against what can be worked out by hand, and against a reader that only copies."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional

from hip_sglang.bench import load_bench
from hip_sglang.demo.architecture import GROUP
from hip_sglang.demo.corpus import library_text
from hip_sglang.demo.exact import ExactDocument, ExactModel
from hip_sglang.demo.vocabulary import tokenizer_of
from tests.benchmarks.copying_server import continued

TASKS = load_bench("tasks")
COPIED = ("quotes", "needle", "needle_context", "multikey2", "multikey3", "multivalue")
VALUES = 4
LEARNT = ("variables", "common", "frequent")


@pytest.fixture(scope="module")
def tokenizer(model_directory: Path) -> Tokenizer:
    return tokenizer_of(model_directory)


def sample(
    tokenizer: Tokenizer, name: str, index: int = 0, length: int = 4096, seed: int = 0
) -> Any:
    (task,) = TASKS.tasks_of([name])
    return task.sample(tokenizer, length, seed, index)


def test_all_tasks_are_tried_here() -> None:
    assert sorted(TASKS.NAMES) == sorted((*COPIED, *LEARNT))


@settings(max_examples=8, deadline=None)
@given(length=st.integers(2048, 6000), seed=st.integers(0, 9), index=st.integers(0, 99))
@pytest.mark.parametrize("name", sorted({*COPIED, *LEARNT} - {"quotes", "needle_context"}))
def test_prompt_and_answer_fill_the_length(
    tokenizer: Tokenizer, name: str, length: int, seed: int, index: int
) -> None:
    made = sample(tokenizer, name, index, length, seed)
    assert len(made.ids) + made.new_tokens == length
    assert made.ids == tuple(tokenizer.encode(made.text).ids)


@pytest.mark.parametrize("length", [2048, 4096, 10_000])
def test_a_prompt_of_quotes_ends_with_a_whole_line_of_the_document(
    tokenizer: Tokenizer, length: int
) -> None:
    made = sample(tokenizer, "quotes", 3, length)
    assert length - 150 < len(made.ids) + made.new_tokens <= length


@pytest.mark.parametrize("name", [*COPIED, *LEARNT])
def test_seed_and_index_decide_a_sample(tokenizer: Tokenizer, name: str) -> None:
    assert sample(tokenizer, name, 1) == sample(tokenizer, name, 1)
    assert sample(tokenizer, name, 1).answers != sample(tokenizer, name, 2).answers
    assert sample(tokenizer, name, 1).answers != sample(tokenizer, name, 1, seed=1).answers


@pytest.mark.parametrize("name", COPIED)
def test_a_reader_that_copies_by_seven_tokens_is_always_right(
    tokenizer: Tokenizer, name: str
) -> None:
    (task,) = TASKS.tasks_of([name])
    for index in range(6):
        made = task.sample(tokenizer, 3000, 5, index)
        said = tokenizer.decode(continued(list(made.ids), made.new_tokens))
        assert task.score(made, said) == 1, made.text[-300:]


@pytest.mark.parametrize("name", [name for name in COPIED if name != "quotes"])
def test_the_built_in_model_is_right_with_exact_attention(
    tokenizer: Tokenizer, model_directory: Path, name: str
) -> None:
    """It compares seven tokens less exactly than a reader, and looks at what stands around them."""
    model = ExactModel(model_directory)
    for index in range(6):
        made = sample(tokenizer, name, index)
        expected = tuple(tokenizer.encode(f" {made.answers[0]}").ids)
        document = ExactDocument.of(model, list(made.ids[:-16]))
        steps = document.teacher_forced(made.ids[-16:], expected)
        seen = torch.arange(steps.keys.shape[1]) < steps.visible[:, None]
        attended = functional.scaled_dot_product_attention(
            steps.queries.transpose(0, 1)[None],
            steps.keys.repeat_interleave(GROUP, 0)[None],
            steps.values.repeat_interleave(GROUP, 0)[None],
            seen,
        )
        logits = model.logits(steps.residual, attended[0].transpose(0, 1))
        assert torch.equal(logits.argmax(-1), steps.expected), made.text[-200:]


@pytest.mark.parametrize("name", LEARNT)
def test_what_must_be_learnt_cannot_be_copied(tokenizer: Tokenizer, name: str) -> None:
    made = sample(tokenizer, name)
    said = tokenizer.decode(continued(list(made.ids), made.new_tokens))
    assert TASKS.tasks_of([name])[0].score(made, said) == 0


@pytest.mark.parametrize("name", ["needle", "multikey2", "multikey3", "multivalue"])
def test_the_answer_stands_once_in_the_text_where_it_is_said_to(
    tokenizer: Tokenizer, name: str
) -> None:
    for index in range(8):
        made = sample(tokenizer, name, index)
        ((answer,), (depth,)) = made.answers, made.depths
        assert made.text.count(answer) == 1
        *_, stem = made.text.splitlines()
        line = made.text[round(depth * len(made.text)) :].splitlines()[0]
        assert line == f"{stem} {answer}."
        # once to be read, once to be continued
        assert made.text.count(stem) == 2


@pytest.mark.parametrize("name", ["needle", "needle_context", "multikey2", "multivalue", "quotes"])
def test_depths_of_ten_samples_are_spread(tokenizer: Tokenizer, name: str) -> None:
    depths = sorted(sample(tokenizer, name, index).depths[0] for index in range(10))
    gaps = [b - a for a, b in zip([0, *depths], [*depths, 1], strict=True)]
    assert max(gaps) < 0.3


def test_a_text_of_keys_is_nothing_but_keys(tokenizer: Tokenizer) -> None:
    for name, pattern in (
        ("multikey2", r"The code of ([a-z]{8}) is (\d{7})\."),
        ("multikey3", r"The code of ([0-9a-f-]{36}) is ([0-9a-f-]{36})\."),
    ):
        _, *lines, _, _ = sample(tokenizer, name).text.splitlines()
        pairs = [re.fullmatch(pattern, line) for line in lines]
        assert all(pairs)
        for group in (1, 2):
            assert len({pair[group] for pair in pairs if pair}) == len(lines) > 30


def test_a_key_has_four_values_far_from_each_other(tokenizer: Tokenizer) -> None:
    for index in range(4):
        made = sample(tokenizer, "multivalue", index)
        told = re.findall(r"The number of (\w{8}) in (\w{6}) is (\d{7})\.", made.text)
        assert len(told) == VALUES
        assert [len(set(column)) for column in zip(*told, strict=True)] == [1, VALUES, VALUES]
        positions = sorted(made.text.index(value) / len(made.text) for _, _, value in told)
        gaps = [b - a for a, b in pairwise(positions)]
        assert min(gaps) > 0.2


def test_a_chain_is_handed_on_in_order(tokenizer: Tokenizer) -> None:
    for index in range(6):
        made = sample(tokenizer, "variables", index)
        value: dict[str, str] = {}
        for to, of in re.findall(r"^Let (\w+) be (\w+)\.$", made.text, re.MULTILINE):
            # what is handed on was there before
            value[to] = of if of.isdecimal() else value[of]
        assert len(value) == 10
        asked = re.search(r"The names that are (\d+):$", made.text)
        assert asked
        assert {name for name in value if value[name] == asked[1]} == set(made.answers)
        for name, depth in zip(made.answers, made.depths, strict=True):
            assert made.text[round(depth * len(made.text)) :].startswith(f"Let {name} be ")


def test_who_lists_both_chains_has_followed_none(tokenizer: Tokenizer) -> None:
    made, (task,) = sample(tokenizer, "variables"), TASKS.tasks_of(["variables"])
    assert len(made.wrong) == 5
    assert not {*made.wrong} & {*made.answers}
    assert task.score(made, " ".join(made.answers)) == 1
    assert task.score(made, " ".join([*made.answers, made.wrong[0]])) == pytest.approx(0.8)
    assert task.score(made, " ".join([*made.answers, *made.wrong])) == 0
    assert task.score(made, " ".join(made.wrong)) == 0


def counted(text: str) -> Counter[str]:
    _, *lines, _, _ = text.splitlines()
    return Counter(" ".join(lines).split())


def test_ten_words_are_common(tokenizer: Tokenizer) -> None:
    made = sample(tokenizer, "common")
    counts = counted(made.text)
    assert {word for word, times in counts.items() if times == 24} == set(made.answers)
    assert {times for word, times in counts.items() if word not in made.answers} == {3}
    assert len(made.answers) == 10 < len(counts)


def test_three_words_are_most_frequent(tokenizer: Tokenizer) -> None:
    counting = load_bench("tasks.counting")
    # 100 / 1.6449 / rank^2, rounded down, and one at least
    assert counting.zeta_counts(100)[:6] == [60, 15, 6, 3, 2, 1]
    assert sum(counting.zeta_counts(100)) == 100
    made = sample(tokenizer, "frequent")
    counts = counted(made.text)
    assert tuple(word for word, _ in counts.most_common(3)) == made.answers
    assert sorted(counts.values(), reverse=True) == counting.zeta_counts(counts.total())
    assert made.depths == ()


def test_ten_quotes_have_one_document(tokenizer: Tokenizer) -> None:
    texts = [sample(tokenizer, "quotes", index).text for index in (0, 9, 10)]
    assert texts[0][:3000] == texts[1][:3000] != texts[2][:3000]
    assert len({sample(tokenizer, "quotes", index).answers for index in range(20)}) == 20


def test_ten_questions_are_asked_of_one_text(tokenizer: Tokenizer) -> None:
    made = [sample(tokenizer, "needle_context", index) for index in range(11)]
    *first, other = ([*text.splitlines()] for text in (each.text for each in made))
    # "Say ...", two lines from before the needle, and its beginning
    assert len({tuple(lines[:-4]) for lines in first}) == 1
    assert first[0][1:-4] != other[1:-4]
    for lines, each in zip(first, made, strict=False):
        (answer,) = each.answers
        at = lines.index(f"{lines[-1]} {answer}.")
        assert lines[at - 2 : at] == lines[-3:-1]
        assert [sum(line.startswith("The number of ") for line in lines)] == [11]
        line = each.text[round(each.depths[0] * len(each.text)) :].splitlines()[0]
        assert line == lines[-3]
    assert len({each.answers for each in made}) == 11
    # the longest question fills the length, and no other one has more
    sizes = [len(each.ids) + each.new_tokens for each in made[:10]]
    assert max(sizes) == 4096
    assert len({each.new_tokens for each in made[:10]}) == 1


def test_quotes_are_from_the_document_that_is_given(tokenizer: Tokenizer) -> None:
    text = library_text(3)[:60_000]
    (task,) = TASKS.tasks_of(["quotes"], text)
    made = task.sample(tokenizer, 4096, 0, 12)
    assert made.answers[0] in text
    assert made.text[1000:2000] in text
    with pytest.raises(ValueError, match="fewer than the 199,920 that a length of 200,000 takes"):
        task.sample(tokenizer, 200_000, 0, 0)


def test_scores_by_hand(tokenizer: Tokenizer) -> None:
    recall = load_bench("tasks.sample").recall
    assert recall(("abc", "def", "ghi"), "so: ABC, defg") == 2 / 3
    assert recall(("abc",), "") == 0
    (quotes,) = TASKS.tasks_of(["quotes"])
    made = sample(tokenizer, "quotes")
    (expected,) = made.answers
    assert quotes.score(made, expected) == 1
    assert quotes.score(made, f" {expected}\N{REPLACEMENT CHARACTER}") == 1
    assert quotes.score(made, f"{expected}s") == quotes.score(made, expected[:-1]) == 0


@pytest.mark.parametrize("name", [*COPIED, *LEARNT])
def test_a_length_that_is_too_short_is_one_line(tokenizer: Tokenizer, name: str) -> None:
    with pytest.raises(ValueError, match=f"too short for the task {name}.* or more") as caught:
        sample(tokenizer, name, length=40)
    assert "\n" not in str(caught.value)
    if name != "quotes":
        # what it says to give is enough
        (least,) = re.findall(r"takes ([\d,]+) with", str(caught.value))
        least = int(least.replace(",", ""))
        assert len(sample(tokenizer, name, length=least).ids) <= least
        with pytest.raises(ValueError, match="too short"):
            sample(tokenizer, name, length=least - 1)


def test_an_unknown_task_is_one_line() -> None:
    with pytest.raises(ValueError, match="there is no task 'nedle'; choose from quotes, needle"):
        TASKS.tasks_of(["nedle"])


def characters() -> Tokenizer:
    """A token a byte, and what a tokenizer of another model may do."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(["<s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.enable_truncation(16)
    return tokenizer


@pytest.mark.parametrize("name", ["needle", "multikey3", "frequent"])
def test_another_tokenizer_s_first_token_and_sizes_count(tmp_path: Path, name: str) -> None:
    characters().save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizer_of(tmp_path)
    made = sample(tokenizer, name, length=4001)
    assert made.ids[0] == 0
    # a mark takes two tokens
    assert len(made.ids) + made.new_tokens in (4000, 4001)


def test_a_model_without_tokenizer_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer\.json") as caught:
        tokenizer_of(tmp_path)
    assert "\n" not in str(caught.value)
    characters().model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    made = sample(tokenizer_of(tmp_path), "needle", length=2000)
    assert 1998 < len(made.ids) + made.new_tokens <= 2000
