"""The tokenizer of any model's directory."""

from __future__ import annotations

from pathlib import Path

from hip_sglang.demo.vocabulary import Tokenizer, load_tokenizer


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
                f"--model {model}: it has no tokenizer.json, and transformers makes none of what "
                f"is there ({' '.join(str(error).split())[:120]}); give the directory of a model"
            ) from None
    # a file may say that texts are cut or filled to one length
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
