"""Samples on their way to a server, a few at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import httpx

from ..tasks import Sample
from .results import Question

AT_ONCE = 4


async def ask_all(
    url: str,
    questions: Sequence[Question],
    sample_of: Callable[[Question], Sample],
    on_answer: Callable[[Question, Sample, str], None],
) -> None:
    """Ask all, in this order, and tell of each answer as it comes.

    Raises ConnectionError where the server refuses one or ends.
    """
    waiting = iter(questions)

    async def work() -> None:
        for question in waiting:
            # a long text takes a second to make
            sample = await asyncio.to_thread(sample_of, question)
            on_answer(question, sample, await _ask(client, question, sample))

    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        await asyncio.gather(*(work() for _ in range(AT_ONCE)))


async def _ask(client: httpx.AsyncClient, question: Question, sample: Sample) -> str:
    sampling = {"temperature": 0, "max_new_tokens": sample.new_tokens}
    body = {"input_ids": sample.ids, "sampling_params": sampling}
    try:
        answer = await client.post("/generate", json=body)
    except httpx.TransportError as error:
        raise ConnectionError(
            f"the server does not answer: {str(error) or type(error).__name__}"
        ) from None
    if answer.is_error:
        raise ConnectionError(
            f"the server answers {answer.status_code} to {question.task} of {question.length:,} "
            f"tokens: {answer.text[:300]}"
        )
    return str(answer.json()["text"])
