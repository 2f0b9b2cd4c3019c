"""The server's API key from a file: arguments are read by everybody on a machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hip_sglang.runtime.requirements import UnsupportedError
from hip_sglang.secret import Secret

FILE_VARIABLE = "HIP_SGLANG_API_KEY_FILE"


def settle_key(server_args: Any) -> None:
    """Take SGLang's ``--api-key`` from the file that the environment names, if it names one.

    Raises UnsupportedError where the file is not there or empty, or a key is given twice.
    """
    file = os.environ.get(FILE_VARIABLE)
    if not file:
        return
    if server_args.api_key is not None:
        raise UnsupportedError(f"--api-key and {FILE_VARIABLE}={file} contradict; give one of them")
    try:
        key = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or "it is not a text file"
        raise UnsupportedError(f"{FILE_VARIABLE}={file}: {problem}; put the key there") from None
    if not key:
        raise UnsupportedError(f"{FILE_VARIABLE}={file}: it is empty; put the key there")
    from sglang.srt.arg_groups.overrides import declare_resolution

    declare_resolution(server_args, FILE_VARIABLE, api_key=Secret(key))
