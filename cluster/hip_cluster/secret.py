"""Keys that do not show themselves."""

from __future__ import annotations

import hmac
import os
from pathlib import Path


class Secret(str):
    """A string whose ``repr`` says nothing, for SGLang writes its arguments into its log."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"

    def matches(self, other: str) -> bool:
        """Whether they are equal, in a time that does not tell how much of them is."""
        return hmac.compare_digest(self.encode(), other.encode())


def read_key(file: str | None, variable: str | None) -> Secret | None:
    """The endpoint's key from a file or from the environment; None where neither is named.

    Raises ValueError where it is not there, or is empty.
    """
    if file is not None:
        try:
            key = Path(file).read_text(encoding="utf-8").strip()
        except OSError as error:
            problem = error.strerror or error
            raise ValueError(f"auth.api_key_file={file}: {problem}; put the key there") from None
        if not key:
            raise ValueError(f"auth.api_key_file={file}: it is empty; put the key there")
        return Secret(key)
    if variable is not None:
        key = os.environ.get(variable, "").strip()
        if not key:
            raise ValueError(f"auth.api_key_env={variable}: it is not set; export it")
        return Secret(key)
    return None
