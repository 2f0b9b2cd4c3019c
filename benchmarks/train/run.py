"""Train by a recipe, and write an ordinary Hugging Face directory."""

from __future__ import annotations

import json
import math
import random
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn.functional import cross_entropy

from hip_sglang.demo.vocabulary import save_tokenizer, train_tokenizer
from hip_sglang.runtime.torchvision_ops import declare_missing_operators

from ..rows import provenance
from .mixture import KINDS, Batch, Mixture
from .recipe import Recipe, Stage

LOG, HELD_OUT = "training.jsonl", "held-out.txt"
LEARNED = 0.95  # of the counted tokens of each kind in LESSONS
LESSONS = ("copy", "recall", "needle")
SHORTER = 0.3  # of the steps are of an earlier stage
WARM_UP, EVERY = 100, 50  # steps
FINAL_RATE = 0.1  # of the recipe's, at the end of its last stage
PERPLEXITY_TOKENS = 65536


def train(
    recipe: Recipe, out: Path, seed: int, seen: Sequence[str], held_out: Sequence[str]
) -> None:
    """Write model, tokenizer, held-out text and the log to ``out``, anew."""
    declare_missing_operators()
    from transformers import LlamaConfig, LlamaForCausalLM

    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    (out / HELD_OUT).write_text("\n".join(held_out), encoding="utf-8")
    tokenizer = train_tokenizer(seen, recipe.vocabulary)
    save_tokenizer(tokenizer, out)
    config = LlamaConfig(vocab_size=tokenizer.get_vocab_size(), **recipe.config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM(config).to(device)
    mixture = Mixture(tokenizer, seen, seed)
    with (out / LOG).open("w", encoding="utf-8") as log:

        def note(**what: Any) -> None:
            log.write(json.dumps(what) + "\n")
            log.flush()

        note(recipe=asdict(recipe), seed=seed, parameters=model.num_parameters(), **provenance())
        for row in _steps(model, mixture, recipe, seed):
            note(**row)
        # as it is written, and as everybody loads it
        model.to(torch.bfloat16).save_pretrained(out)
        ids = tokenizer.encode("\n".join(held_out)).ids[:PERPLEXITY_TOKENS]
        note(perplexity=perplexity(model.float(), ids, recipe.stages[-1].tokens))


def _steps(model: Any, mixture: Mixture, recipe: Recipe, seed: int) -> Iterator[dict[str, Any]]:
    """Every so many steps what was reached."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    chance, began, done, tokens = random.Random(seed), time.monotonic(), 0, 0
    with Progress() as progress:
        for number, stage in enumerate(recipe.stages):
            bar = progress.add_task(f"{stage.tokens:,} tokens", total=stage.steps)
            recent: deque[tuple[Counter[str], Counter[str]]] = deque(maxlen=EVERY)
            for step in range(stage.steps):
                now = stage
                if number and chance.random() < SHORTER:
                    now = chance.choice(recipe.stages[:number])
                last = stage is recipe.stages[-1]
                rate = recipe.rate * min(1.0, (done + 1) / WARM_UP)
                rate *= _decay(step / stage.steps) if last else 1.0
                for group in optimizer.param_groups:
                    group["lr"] = rate
                batch = mixture.batch(now.tokens, now.sequences)
                loss, right, asked = _loss(model, batch, _positions(chance, now, stage))
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                if now is stage:
                    recent.append((right, asked))
                done += 1
                tokens += batch.ids.numel()
                progress.update(bar, advance=1)
                ends = step + 1 == stage.steps
                if done % EVERY == 0 or ends:
                    accuracy = _accuracy(recent)
                    shown = " ".join(f"{kind} {share:.2f}" for kind, share in accuracy.items())
                    progress.update(bar, description=f"{now.tokens:,} tokens: {shown}")
                    yield {
                        "stage": stage.tokens, "step": done, "tokens": tokens,
                        "seconds": round(time.monotonic() - began, 1),
                        "loss": round(loss.item(), 4), "right": accuracy,
                    }  # fmt: skip
                    learned = all(accuracy.get(kind, 0.0) >= LEARNED for kind in LESSONS)
                    if learned and len(recent) == EVERY and not last:
                        break


def _positions(chance: random.Random, now: Stage, stage: Stage) -> Tensor:
    """[T]: with a gap somewhere, so that short contexts know the distances of long ones.

    As PoSE (arXiv 2309.10400) has it, for half of the short ones.
    """
    positions = torch.arange(now.tokens)
    if now.tokens < stage.tokens and chance.random() < 0.5:
        positions[chance.randrange(now.tokens) :] += chance.randrange(stage.tokens - now.tokens)
    return positions


def _decay(share: float) -> float:
    return FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * share)) / 2


def _loss(model: Any, batch: Batch, positions: Tensor) -> tuple[Tensor, Counter[str], Counter[str]]:
    """Mean over the counted tokens; how many were right, and how many there were, by kind."""
    device = model.device
    ids = batch.ids.to(device)
    # a token is predicted from the one before it
    counted = batch.counted[:, 1:].to(device)
    with torch.autocast(device.type, torch.bfloat16):
        hidden = model.model(
            input_ids=ids, position_ids=positions[None].to(device), use_cache=False
        ).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][counted])
    wanted = ids[:, 1:][counted]
    loss = cross_entropy(logits.float(), wanted)
    hits = (logits.argmax(-1) == wanted).cpu()
    kinds = batch.kinds[:, None].expand(-1, counted.shape[1])[counted.cpu()]
    asked = torch.bincount(kinds, minlength=len(KINDS)).tolist()
    right = torch.bincount(kinds[hits], minlength=len(KINDS)).tolist()
    return loss, *(Counter(dict(zip(KINDS, found, strict=True))) for found in (right, asked))


def _accuracy(recent: deque[tuple[Counter[str], Counter[str]]]) -> dict[str, float]:
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for one, other in recent:
        right.update(one)
        asked.update(other)
    return {kind: round(right[kind] / asked[kind], 4) for kind in KINDS if asked[kind]}


@torch.no_grad()
def perplexity(model: Any, ids: list[int], context: int) -> float:
    """Of text, in pieces of ``context`` tokens that know nothing of each other."""
    pieces = torch.tensor(ids[: len(ids) // context * context]).view(-1, context)
    losses = [
        cross_entropy(model(piece[None].to(model.device)).logits[0, :-1].float().cpu(), piece[1:])
        for piece in pieces
    ]
    return float(torch.stack(losses).mean().exp())
