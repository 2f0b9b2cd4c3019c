"""``hip-sglang cache``: the prefixes that are kept on a disk, whether a server runs or not."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from hip_sglang.cli_errors import CliError, one_line_errors
from hip_sglang.kv.disk_place import Kept, kept_in
from hip_sglang.secret import key_of_file

if TYPE_CHECKING:
    from hip_sglang.kv.page_record import Header

cache_app = typer.Typer(help="Prefixes that are kept on disk (offload.disk).")
Directory = Annotated[Path, typer.Argument(help="The path of offload.disk.", show_default=False)]


@dataclass(frozen=True)
class Page:
    """A file of one page."""

    header: Header
    nbytes: int
    used: float  # when, in seconds since the epoch


@dataclass(frozen=True)
class Prefix:
    """A prefix that no longer one goes on from."""

    key: str
    pages: int  # that a request would find
    own_bytes: int  # of pages that no other prefix has
    used: float


@cache_app.command("ls")
def list_prefixes(directory: Directory) -> None:
    """List the prefixes: how long, how large, and when they were last used."""
    table = Table(_id("Id", 16), _id("Prefix", 12), "Tokens", "Of its own", "Last used")
    for kept in _kept(directory):
        for prefix in sorted(prefixes_of(pages_of(kept)), key=lambda one: -one.used):
            table.add_row(
                kept.path.name,
                prefix.key[:12],
                f"{prefix.pages * kept.page_size:,}",
                _size(prefix.own_bytes),
                _ago(prefix.used),
            )
    Console().print(table)


@cache_app.command("stat")
def show_totals(directory: Directory) -> None:
    """Say what belongs to which model, how large it is, and whether a server uses it."""
    names = "Model", "KV", "Ranks", "Tokens", "On disk", "Last used", "Server"
    table = Table(_id("Id", 16), *names)
    for kept in _kept(directory):
        pages = pages_of(kept)
        table.add_row(
            kept.path.name,
            str(kept.manifest.get("model")),
            str(kept.manifest.get("kv_dtype")).removeprefix("torch."),
            str(kept.manifest.get("tp_size")),
            f"{len({page.header.key for page in pages}) * kept.page_size:,}",
            _size(kept.nbytes),
            _ago(max((page.used for page in pages), default=0.0)),
            "running" if kept.in_use else "none",
        )
    Console().print(table)


@cache_app.command("verify")
def verify_pages(directory: Directory) -> None:
    """Read every page, and name those that are not as they were written; a server drops them."""
    from hip_sglang.kv.page_record import BrokenRecordError, verify

    broken, seen = 0, 0
    for kept in _kept(directory):
        for file in track(sorted(kept.files), kept.path.name, console=Console(stderr=True)):
            try:
                header = verify(memoryview(file.read_bytes()))
                if not file.name.startswith(header.key):
                    raise BrokenRecordError("it holds another page")
            except FileNotFoundError:  # a server made room
                continue
            except (OSError, BrokenRecordError) as error:
                print(f"{file}: {error}")
                broken += 1
            seen += 1
    print(f"{seen - broken:,} of {seen:,} pages are as they were written")
    raise typer.Exit(1 if broken else 0)


@cache_app.command("drop")
def drop(
    directory: Directory,
    model: Annotated[
        str | None, typer.Argument(help="The id of one, as stat shows it; none: all.")
    ] = None,
) -> None:
    """Free what is kept; a running server's is refused."""
    found = [kept for kept in _kept(directory) if model in (None, kept.path.name)]
    if not found:
        raise CliError(f"nothing in {directory} has the id {model}; `hip-sglang cache stat` lists")
    if used := [kept.path.name for kept in found if kept.in_use]:
        raise CliError(
            f"{', '.join(used)} is in use by a running server; stop it, or name another id"
        )
    for kept in found:
        size = kept.nbytes
        with one_line_errors():
            kept.drop()
        print(f"{kept.path.name}: {_size(size)} freed")


@cache_app.command("warm")
def warm(
    files: Annotated[list[Path], typer.Argument(help="Text files; each is a prefix.")],
    url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:30000",
) -> None:
    """Let a running server read documents before anybody asks about them."""
    import httpx

    with one_line_errors():
        key = key_of_file()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        texts = {file: file.read_text(encoding="utf-8") for file in files}
        with httpx.Client(base_url=url, headers=headers, timeout=None) as client:
            for file, text in track(texts.items(), "warming", console=Console(stderr=True)):
                body = {"text": text, "sampling_params": {"max_new_tokens": 0}}
                try:
                    answer = client.post("/generate", json=body)
                except httpx.TransportError as error:
                    raise CliError(f"no server answers at {url}: {error}; give --url") from None
                if answer.is_error:
                    raise CliError(
                        f"{file}: the server answers {answer.status_code}: {answer.text}"
                    )
                told = answer.json()["meta_info"]
                print(f"{file}: {told['prompt_tokens']:,} tokens, {told['cached_tokens']:,} known")


def pages_of(kept: Kept) -> list[Page]:
    """The first rank's: each rank has the same ones."""
    from hip_sglang.kv.page_record import HEADER_BYTES, BrokenRecordError, Header

    found = []
    for place in kept.places:
        if place.name.partition(".")[0] != "rank0":
            continue
        for file in place.glob("*.bin"):
            try:
                with file.open("rb") as stream:
                    header = Header.read(stream.read(HEADER_BYTES))
                status = file.stat()
            except (OSError, BrokenRecordError):
                continue
            found.append(Page(header, status.st_size, status.st_mtime))
    return found


def prefixes_of(pages: Iterable[Page]) -> Iterator[Prefix]:
    """Those that no longer one goes on from; of each, what a request would find."""
    by_key = {page.header.key: page for page in pages}
    children = Counter(page.header.parent for page in by_key.values())
    for last in by_key.values():
        if last.header.key in children:
            continue
        own, alone, depth = 0, True, 0
        at: Page | None = last
        while at is not None:
            depth += 1
            alone = alone and children[at.header.key] < 2
            own += at.nbytes * alone
            if at.header.parent is None:
                break
            at = by_key.get(at.header.parent)
        # of no use where a page before is missing
        yield Prefix(last.header.key, 0 if at is None else depth, own, last.used)


def _kept(directory: Path) -> list[Kept]:
    if not directory.is_dir():
        raise CliError(f"{directory} is not a directory; give the path of offload.disk")
    if not (found := kept_in(directory)):
        raise CliError(f"{directory} holds no prefixes; a server with offload.disk makes some")
    return found


def _id(name: str, width: int) -> Column:
    """One that stays whole in a narrow terminal."""
    return Column(name, min_width=width)


def _size(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.1f} MiB"


def _ago(when: float) -> str:
    seconds = max(0, int(time.time() - when))
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = seconds // length
            return f"{count} {unit}{'s' * (count > 1)} ago"
    return "just now"
