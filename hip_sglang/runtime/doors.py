"""The ways in: command-line flags, ``sgl.Engine`` keywords, and how an error leaves by each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from hip_sglang.config import HipConfig
from hip_sglang.config_text import ConfigError
from hip_sglang.runtime.requirements import BACKEND, UnsupportedError

# travels with ServerArgs: attributes with an underscore are pickled to every rank
CONFIG_ATTRIBUTE = "_hip_config"


def config_of(server_args: Any) -> HipConfig:
    """The configuration that came with these server arguments, or the defaults."""
    config = getattr(server_args, CONFIG_ATTRIBUTE, None)
    return config if isinstance(config, HipConfig) else HipConfig()


def add_cli_args(original: Callable[..., None], parser: argparse.ArgumentParser) -> None:
    """Around ``ServerArgs.add_cli_args``: our two flags after SGLang's."""
    original(parser)
    group = parser.add_argument_group(BACKEND)
    group.add_argument(
        "--hip-config",
        metavar="JSON|PATH",
        help=f'Settings of --attention-backend {BACKEND}: JSON such as {{"budget": 4096}}, '
        "or a path to a JSON file.",
    )
    group.add_argument(
        "--hip-preset",
        metavar="NAME",
        help="balanced (default), quality (dense prefill, a longer second look), dense (nothing "
        "pruned) or paper (HiP as published).",
    )


def from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    """Around ``ServerArgs.from_cli_args``: parse our flags and attach what they say."""
    source, preset = getattr(args, "hip_config", None), getattr(args, "hip_preset", None)
    server_args = original(cls, args)
    if source is not None or preset is not None:
        try:
            setattr(server_args, CONFIG_ATTRIBUTE, HipConfig.load(source, preset))
        except ConfigError as error:
            leave(error)
    return server_args


def engine_server_args(
    *, hip_config: Any = None, hip_preset: str | None = None, **kwargs: Any
) -> Any:
    """``Engine.server_args_class``: build ServerArgs, with our keywords taken out."""
    from sglang.srt.server_args import ServerArgs

    server_args = ServerArgs(**kwargs)
    if hip_config is not None or hip_preset is not None:
        config = hip_config if isinstance(hip_config, HipConfig) else None
        if config is None or hip_preset is not None:
            config = HipConfig.load(hip_config, hip_preset)
        setattr(server_args, CONFIG_ATTRIBUTE, config)
    return server_args


@contextmanager
def errors_for(server_args: Any) -> Iterator[None]:
    """One line and exit code 2 for a command line; the ValueError itself for a program."""
    try:
        yield
    except (UnsupportedError, ConfigError) as error:
        if came_from_command_line(server_args):
            leave(error)
        raise


def came_from_command_line(server_args: Any) -> bool:
    """Whether SGLang built these arguments from argv, not from ``Engine(...)`` or by hand."""
    command = getattr(server_args, "launch_command", None)
    return command is not None and not command.startswith("Engine(")


def leave(error: Exception) -> NoReturn:
    """End the process the way argparse does, without the page of usage."""
    print(f"hip-sglang: error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2)
