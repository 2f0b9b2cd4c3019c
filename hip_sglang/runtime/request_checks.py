"""Refuse requests that SGLang passes on and that would end the server in the middle of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


def validate_one_request(
    original: Callable[..., None], manager: Any, obj: Any, input_ids: list[int] | None
) -> None:
    """Around ``TokenizerManager._validate_one_request``; a ValueError there is HTTP 400."""
    original(manager, obj, input_ids)
    vocabulary = int(manager.model_config.vocab_size)
    # placeholders of images and sound are not tokens
    if input_ids is not None and not obj.contains_mm_input():
        check_tokens("input_ids", input_ids, vocabulary)
    sampling = getattr(obj, "sampling_params", None) or {}
    check_tokens("stop_token_ids", sampling.get("stop_token_ids") or (), vocabulary)


def check_tokens(name: str, ids: Iterable[Any], vocabulary: int) -> None:
    """Raise a ValueError that names the first id that is no row of the embedding."""
    for index, token in enumerate(ids):
        # bool is an int to Python, and no token to anyone
        if type(token) is not int or not 0 <= token < vocabulary:
            raise ValueError(
                f"{name}[{index}] = {token!r} is not a token of this model; "
                f"ids are whole numbers from 0 to {vocabulary - 1}"
            )
