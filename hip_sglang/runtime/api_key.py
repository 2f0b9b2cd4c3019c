"""SGLang's ``--api-key``, from a file."""

from __future__ import annotations

from typing import Any

from hip_sglang.runtime.requirements import UnsupportedError
from hip_sglang.secret import FILE_VARIABLE, key_of_file


def settle_key(server_args: Any) -> None:
    """Take SGLang's ``--api-key`` from the file that the environment names, if it names one.

    Raises UnsupportedError where the file is not there or empty, or a key is given twice.
    """
    try:
        key = key_of_file()
    except ValueError as error:
        raise UnsupportedError(str(error)) from None
    if key is None:
        return
    if server_args.api_key is not None:
        raise UnsupportedError(f"--api-key and {FILE_VARIABLE} contradict; give one of them")
    from sglang.srt.arg_groups.overrides import declare_resolution

    declare_resolution(server_args, FILE_VARIABLE, api_key=key)
