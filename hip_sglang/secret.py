"""Keys that do not show themselves, and the file that the server's is in."""

from __future__ import annotations

import hmac
import os
from pathlib import Path

# arguments are read by everybody on a machine
FILE_VARIABLE = "HIP_SGLANG_API_KEY_FILE"


class Secret(str):
    """A string whose ``repr`` says nothing, for SGLang writes its arguments into its log."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"

    def matches(self, other: str) -> bool:
        """Whether they are equal, in a time that does not tell how much of them is."""
        return hmac.compare_digest(self.encode(), other.encode())


def key_of_file() -> Secret | None:
    """The server's API key, where the environment names a file of it.

    Raises ValueError, with the file's name, where it is not there, no text, or empty.
    """
    file = os.environ.get(FILE_VARIABLE)
    if not file:
        return None
    try:
        key = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or "it is not a text file"
        raise ValueError(f"{FILE_VARIABLE}={file}: {problem}; put the key there") from None
    if not key:
        raise ValueError(f"{FILE_VARIABLE}={file}: it is empty; put the key there")
    return Secret(key)
