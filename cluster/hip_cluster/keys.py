"""The keys of an endpoint."""

from __future__ import annotations

import os
from pathlib import Path

from hip_sglang.secret import Secret


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
