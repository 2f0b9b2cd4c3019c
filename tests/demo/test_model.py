"""The built-in model: an ordinary Hugging Face directory that continues quotes from its context."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hip_sglang.demo.architecture import HIDDEN
from hip_sglang.demo.corpus import Document
from hip_sglang.demo.exact import ExactDocument, ExactModel, Steps, attend_densely
from hip_sglang.demo.model import write_model
from hip_sglang.demo.quotes import Quote, pick_quotes
from hip_sglang.demo.vocabulary import Tokenizer, load_tokenizer
from hip_sglang.runtime.torchvision_ops import declare_missing_operators


@pytest.fixture(scope="module")
def quotes(document: Document, tokenizer: Tokenizer) -> list[Quote]:
    return pick_quotes(document, tokenizer, 8)


@pytest.fixture(scope="module")
def llama(model_directory: Path) -> Any:
    declare_missing_operators()
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(model_directory, dtype=torch.float32)


@pytest.fixture(scope="module")
def exact(model_directory: Path, document: Document) -> ExactDocument:
    return ExactDocument.of(ExactModel(model_directory), document.ids)


def lead(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """By how much the expected token's logit is ahead of every other [S]."""
    own = logits.gather(1, expected[:, None])
    others = logits.scatter(1, expected[:, None], -torch.inf)
    return own[:, 0] - others.amax(1)


def exact_logits(exact: ExactDocument, quote: Quote) -> tuple[torch.Tensor, Steps]:
    steps = exact.teacher_forced(quote.suffix_ids, quote.expected_ids)
    return exact.model.logits(steps.residual, attend_densely(steps)[0]), steps


@torch.no_grad()
def test_transformers_continues_every_quote_verbatim(
    llama: Any, document: Document, quotes: list[Quote]
) -> None:
    prefix = torch.tensor([document.ids])
    cache = llama(prefix, use_cache=True, logits_to_keep=1).past_key_values
    for quote in quotes[::2]:
        cache.crop(len(document.ids))
        tokens, answer = torch.tensor([quote.suffix_ids]), []
        for _ in quote.expected_ids:
            logits = llama(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            tokens = logits[:, -1].argmax(-1, keepdim=True)
            answer.append(int(tokens))
        assert tuple(answer) == quote.expected_ids


@torch.no_grad()
def test_the_exact_engine_computes_what_transformers_computes(
    llama: Any, document: Document, exact: ExactDocument, quotes: list[Quote]
) -> None:
    quote = quotes[3]
    logits, steps = exact_logits(exact, quote)
    ids = [*document.ids, *quote.suffix_ids, *quote.expected_ids[:-1]]
    theirs = llama(torch.tensor([ids])).logits[0, -len(quote.expected_ids) :]
    assert (logits - theirs).abs().max() < 0.01
    assert steps.visible.tolist()[-1] == len(ids)


def test_the_margins_are_wide_in_float32_and_bfloat16(
    model_directory: Path, document: Document, exact: ExactDocument, quotes: list[Quote]
) -> None:
    rounded = ExactDocument.of(ExactModel(model_directory, torch.bfloat16), document.ids)
    for engine in (exact, rounded):
        for quote in quotes[::2]:
            logits, steps = exact_logits(engine, quote)
            assert lead(logits, steps.expected).min() > 15


@pytest.mark.soak
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [8192, 32768, 131072])
def test_every_quote_of_a_long_document_is_continued(
    model_directory: Path, library: str, tokenizer: Tokenizer, tokens: int, dtype: torch.dtype
) -> None:
    document = Document.cut(library, tokenizer, tokens)
    exact = ExactDocument.of(ExactModel(model_directory, dtype), document.ids)
    for quote in pick_quotes(document, tokenizer, 10):
        logits, steps = exact_logits(exact, quote)
        assert lead(logits, steps.expected).min() > 3


def test_both_heads_of_layer_1_look_at_the_answer(
    exact: ExactDocument, quotes: list[Quote]
) -> None:
    for quote in quotes:
        steps = exact.teacher_forced(quote.suffix_ids, quote.expected_ids)
        _, weights = attend_densely(steps)
        at = quote.target + torch.arange(len(quote.expected_ids))
        mass = weights[torch.arange(len(at)), :, at]
        # head 1 is exact; head 0 knows trigrams only and may hesitate
        assert mass[:, 4:].min() > 0.9
        assert mass[:, :4].mean() > 0.8


def test_a_tail_of_layer_0_equals_the_whole(exact: ExactDocument, document: Document) -> None:
    ids = torch.tensor(document.ids)
    whole = exact.model.residual(ids)
    torch.testing.assert_close(exact.model.residual(ids, 70), whole[-70:], atol=1e-4, rtol=1e-4)
    # the first tokens look for tokens that are not there: an FFT alone would be noise
    start = ids[:20]
    torch.testing.assert_close(exact.model.residual(start), whole[:20], atol=1e-4, rtol=1e-4)


def test_the_same_text_and_seed_give_the_same_bytes(library: str, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        write_model(tmp_path / name, seed=seed, text=library[:300_000])
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    assert names == sorted(path.name for path in (tmp_path / "same").iterdir())
    for name in names:
        content = (tmp_path / "one" / name).read_bytes()
        assert (tmp_path / "same" / name).read_bytes() == content, name
        changed = (tmp_path / "other" / name).read_bytes() != content
        assert changed == (name == "model.safetensors")


def test_the_norms_disturb_nothing(model_directory: Path, exact: ExactDocument) -> None:
    embedding = load_file(model_directory / "model.safetensors")["model.embed_tokens.weight"]
    torch.testing.assert_close(embedding.pow(2).sum(1), torch.full((len(embedding),), HIDDEN * 1.0))
    scale = load_file(model_directory / "model.safetensors")[
        "model.layers.1.input_layernorm.weight"
    ]
    # the first tokens have few neighbours and long bags
    power = exact.model.residual(exact.ids)[64:].pow(2).mean(1)
    assert (scale[0] / power.sqrt() - 1).abs().max() < 0.01


def test_the_configuration_is_an_ordinary_llama(model_directory: Path) -> None:
    config = json.loads((model_directory / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["max_position_embeddings"] == 1 << 20
    assert config["rope_parameters"]["rope_theta"] == 1e12


def test_a_model_of_another_script_continues_its_quotes(tmp_path: Path) -> None:
    draw = random.Random(0)
    syllables = [a + b for a in "бвгдзклмнпрст" for b in "аеиоу"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(600)]
    text = "\n".join(" ".join(draw.choices(words, k=9)) for _ in range(300))
    write_model(tmp_path, text=text)
    tokenizer = load_tokenizer(tmp_path)
    document = Document.cut(text, tokenizer, 2048)
    exact = ExactDocument.of(ExactModel(tmp_path), document.ids)
    for quote in pick_quotes(document, tokenizer, 4):
        logits, steps = exact_logits(exact, quote)
        assert lead(logits, steps.expected).min() > 5


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype='int8' is not one of float32, bfloat16"):
        write_model(tmp_path, dtype="int8")
