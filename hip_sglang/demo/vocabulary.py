"""Tokenizers: of our own models, a byte-level BPE trained on Python's source, and of any other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import (  # type: ignore[import-untyped]
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    trainers,
)

from hip_sglang.demo.architecture import MAX_POSITION, VOCABULARY

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
_FILE_NAME = "tokenizer.json"

__all__ = [
    "END_OF_TEXT",
    "END_OF_TEXT_ID",
    "Tokenizer",
    "load_tokenizer",
    "save_tokenizer",
    "tokenizer_of",
    "train_tokenizer",
]


def train_tokenizer(texts: Sequence[str], size: int = VOCABULARY) -> Tokenizer:
    """A byte-level BPE tokenizer of at most ``size`` tokens; the same texts give the same one.

    Trained line by line, so that no token reaches over a line break: a quote that starts at a line
    start then has the same tokens wherever it stands.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    lines = (line for text in texts for line in text.splitlines(keepends=True))
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write what ``transformers.AutoTokenizer`` loads."""
    tokenizer.save(str(directory / _FILE_NAME))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "model_max_length": MAX_POSITION,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a model directory, without importing transformers."""
    return Tokenizer.from_file(str(directory / _FILE_NAME))


def tokenizer_of(model: Path) -> Tokenizer:
    """From ``tokenizer.json``, or what transformers makes of the files that older models have.

    Raises ValueError where there is neither.
    """
    if (model / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(model)
    else:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
            tokenizer = tokenizer.backend_tokenizer
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{model}: it has no tokenizer.json, and transformers makes none of what "
                f"is there ({' '.join(str(error).split())[:120]}); give the directory of a model"
            ) from None
    # a file may say that texts are cut or filled to one length
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
