"""What a search needs: the model, the text in its tokens, and what makes it this search."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from hip_kernels.layout import PAGE_SIZE

from hip_sglang.config import HipConfig
from hip_sglang.demo.corpus import library_text, read_text
from hip_sglang.demo.model import BUILTIN, write_model
from hip_sglang.demo.vocabulary import Tokenizer, tokenizer_of
from hip_sglang.explain import parse_lengths
from hip_sglang.fingerprint import fingerprint
from hip_sglang.journal import settle
from hip_sglang.provenance import versions
from hip_sglang.tune.run import PIECES, SETTINGS, TRIALS, Settings, run_tune
from hip_sglang.tune.search import Trials
from hip_sglang.tune.teacher import Teacher

# of Python's library: tokens have some three characters
LIBRARY_CHARACTERS = 24


def start(
    model: str,
    data: Sequence[Path],
    lengths: str,
    steps: int,
    trials: int,
    seed: int,
    hip_config: str | None,
    out: Path,
) -> int:
    """As ``run_tune``, from what a command line has. Raises ValueError as it does."""
    wanted = parse_lengths(lengths)
    short, long = wanted[0], wanted[-1]
    if len(wanted) > 2 or short <= 2 * steps:
        raise ValueError(
            f"--lengths {lengths}: give one or two lengths, each more than twice --steps {steps}"
        )
    base = HipConfig.load(hip_config)
    texts = [read_text(path) for path in data]
    if not texts:
        # whole documents of both lengths, and as much again that no search sees
        texts = [library_text(seed)[: LIBRARY_CHARACTERS * PIECES * long]]
    out.mkdir(parents=True, exist_ok=True)
    # nobody else searches there until this is done
    with closing(Trials(out / TRIALS)) as known:
        directory = Path(model)
        if model == BUILTIN:
            directory = out / "model"
            write_model(directory)
        settings = Settings(
            model=model if model == BUILTIN else str(directory.resolve()),
            fingerprint=fingerprint(directory),
            version=versions("hip-sglang")["hip-sglang"],
            data=[hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts],
            short=short,
            long=long,
            steps=steps,
            seed=seed,
            page=PAGE_SIZE,
            hip=base.model_dump(mode="json", exclude_unset=True),
        )
        settle(out / SETTINGS, asdict(settings), known.journal)
        teacher = Teacher(directory)
        teacher.has_room_for(long)
        ids = tokens_of(tokenizer_of(directory), texts)
        return run_tune(teacher, ids, settings, trials, out, known)


def tokens_of(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    """Of all texts, one after the other."""
    found = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [token for encoding in found for token in encoding.ids]
