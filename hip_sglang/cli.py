"""``hip-sglang``: serve, demo, bench, eval, config, cache, plan, doctor."""

from __future__ import annotations

import errno
import importlib.util
import os
import socket
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from hip_kernels.page_size import page_size
from typer.exceptions import TyperException

from hip_sglang.cache_cli import cache_app
from hip_sglang.cli_errors import CliError, one_line_errors
from hip_sglang.config_cli import config_app
from hip_sglang.eval_cli import evaluate
from hip_sglang.plan import plan
from hip_sglang.tune_cli import tune

# heavy modules (torch, sglang, our own mathematics) are imported inside the commands that need them

PASSED_THROUGH = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "allow_interspersed_args": False,
}

app = typer.Typer(
    help="HiP attention for SGLang: very long contexts, nothing overlooked.",
    add_completion=False,
    invoke_without_command=True,
)
demo_app = typer.Typer(invoke_without_command=True)
app.add_typer(demo_app, name="demo")
app.add_typer(config_app, name="config")
app.add_typer(cache_app, name="cache")
app.command()(plan)
app.command()(tune)
app.command("eval")(evaluate)


def main() -> None:
    """The entry point of the ``hip-sglang`` program."""
    sys.exit(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
    """Run one command line; what the user can mend is one line on stderr and exit code 2."""
    command = typer.main.get_command(app)
    try:
        with one_line_errors():
            page_size()
        code = command.main(args=argv, prog_name="hip-sglang", standalone_mode=False)
    except TyperException as error:
        print(f"hip-sglang: {error.format_message()}", file=sys.stderr)
        return 2
    except typer.Abort:
        return 130
    return code if isinstance(code, int) else 0


@app.callback()
def _top(
    ctx: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if show_version:
        print(version("hip-sglang"))
    elif ctx.invoked_subcommand is None:
        print(ctx.get_help())


@app.command(context_settings=PASSED_THROUGH, add_help_option=False)
def serve(ctx: typer.Context) -> None:
    """Start SGLang's own server with HiP attention; takes SGLang's arguments."""
    arguments = server_arguments(ctx.args)
    if importlib.util.find_spec("sglang") is None:
        raise CliError("SGLang is not installed; run `make setup`, then `hip-sglang doctor`")
    if not {"-h", "--help"} & set(arguments):
        host = option(arguments, "--host") or "127.0.0.1"
        require_free_port(host, option(arguments, "--port") or "30000")
    sys.stdout.flush()
    # one process becomes the other, so signals and the exit code need no forwarding
    os.execv(sys.executable, [sys.executable, "-m", "sglang.launch_server", *arguments])


def server_arguments(given: list[str]) -> list[str]:
    """What SGLang's launcher gets: the given arguments, and our backend where none is chosen."""
    chosen = ("--attention-backend", "--prefill-attention-backend", "--decode-attention-backend")
    if any(option(given, name) is not None for name in chosen):
        return list(given)
    return ["--attention-backend", "hip_attention", *given]


def option(arguments: list[str], name: str) -> str | None:
    """The value of ``name VALUE`` or ``name=VALUE``; the last one counts, as in argparse."""
    value = None
    for index, argument in enumerate(arguments):
        if argument == name:
            value = arguments[index + 1] if index + 1 < len(arguments) else ""
        elif argument.startswith(f"{name}="):
            value = argument.removeprefix(f"{name}=")
    return value


def require_free_port(host: str, port: str) -> None:
    """Refuse a port that somebody listens on, before the minute that the server takes to start."""
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise CliError(f"--port {port} is not a port; give a number from 1 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, int(port), type=socket.SOCK_STREAM
        )[0]
    except socket.gaierror:
        raise CliError(f"--host {host} is not an address of this machine") from None
    with socket.socket(family, kind, protocol) as probe:
        # the server sets this too: a port in TIME_WAIT is free
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise CliError(f"cannot listen on {host}:{port}: {error.strerror}") from None
            raise CliError(
                f"port {port} on {host} is in use; stop the program that listens there, "
                "or choose another port with --port"
            ) from None


@demo_app.callback()
def demo(
    ctx: typer.Context,
    doc: Annotated[
        Path | None, typer.Option(help="Document to quote from; Python's library if none.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the report and the plot.")] = Path(
        "demo-out"
    ),
    context: Annotated[
        int, typer.Option(min=1024, help="Tokens of the document to serve.")
    ] = 65536,
    offload: Annotated[
        bool, typer.Option(help="Keep KV in host memory; the device holds an eighth of it.")
    ] = False,
    prefix: Annotated[
        bool, typer.Option(help="Keep it on disk, too: twenty questions, and a restart.")
    ] = False,
) -> None:
    """Serve a long document with HiP attention and continue quotes from it."""
    if ctx.invoked_subcommand is not None:
        return
    if doc is not None and not doc.is_file():
        raise CliError(f"--doc {doc}: there is no such file; give the path of a text file")
    with one_line_errors():
        if prefix:
            from hip_sglang.demo.restart import run_restart_demo

            raise typer.Exit(run_restart_demo(doc, out, context))
        from hip_sglang.demo.run import run_demo

        raise typer.Exit(run_demo(doc, out, context, offload=offload))


@demo_app.command("model")
def demo_model(
    directory: Annotated[Path, typer.Argument(help="Where to write the model.")],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of its token codes.")] = 0,
) -> None:
    """Write the built-in retrieval model: an ordinary Hugging Face directory."""
    from hip_sglang.demo.model import write_model

    with one_line_errors():
        write_model(directory, dtype=dtype, seed=seed)
    print(f"wrote {directory}; serve it with: hip-sglang serve --model-path {directory}")


@app.command(context_settings=PASSED_THROUGH)
def bench(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="Which benchmark, such as attention.")],
) -> None:
    """Measure this machine: hip-sglang bench attention --help."""
    from hip_sglang.bench import bench_names, load_bench

    if name not in bench_names():
        raise CliError(f"there is no benchmark {name!r}; choose one of {', '.join(bench_names())}")
    module = load_bench(name)
    with one_line_errors():
        raise typer.Exit(module.main(ctx.args))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what this machine can run and what is missing."""
    from hip_sglang.doctor import examine, print_json, print_table

    findings = examine()
    can_serve = (print_json if as_json else print_table)(findings)
    raise typer.Exit(0 if can_serve else 1)
