"""``hip-sglang cache`` on a directory that a tier wrote to."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from hip_sglang.cache_cli import Page, prefixes_of
from hip_sglang.cli import run
from hip_sglang.kv.disk_place import kept_in
from hip_sglang.kv.page_record import Header
from tests.kv.test_disk_tier import Kept


@pytest.fixture
def stopped(tmp_path: Path) -> Kept:
    """What a server that ended left: twelve pages."""
    kept = Kept(tmp_path)
    kept.write()
    kept.close()
    return kept


def test_prefixes_and_totals_are_listed(
    stopped: Kept, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["cache", "ls", str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    assert stopped.keys[-1][:12] in listed
    assert "768" in listed
    assert run(["cache", "stat", str(tmp_path)]) == 0
    totals = capsys.readouterr().out
    assert stopped.files.place.path.parent.name in totals
    assert "none" in totals


def test_a_file_that_goes_meanwhile_is_not_counted(stopped: Kept, tmp_path: Path) -> None:
    (kept,) = kept_in(tmp_path)
    before = kept.nbytes
    assert before > 0
    (kept.places[0] / "gone.bin").symlink_to("nowhere")
    assert kept.nbytes == before


def test_verify_names_the_file_that_was_harmed(
    stopped: Kept, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["cache", "verify", str(tmp_path)]) == 0
    assert "12 of 12 pages" in capsys.readouterr().out
    file = stopped.file(3)
    file.write_bytes(file.read_bytes()[:-1])
    assert run(["cache", "verify", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert f"{file}: its checksum is wrong" in said
    assert "11 of 12 pages" in said


def test_drop_frees_all_but_what_a_server_uses(
    stopped: Kept, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running = Kept(tmp_path)
    assert run(["cache", "drop", str(tmp_path)]) == 2
    assert "in use by a running server" in capsys.readouterr().err
    running.close()
    assert run(["cache", "drop", str(tmp_path), "nothing"]) == 2
    assert "has the id nothing" in capsys.readouterr().err
    assert run(["cache", "drop", str(tmp_path)]) == 0
    assert not list(tmp_path.iterdir())
    assert run(["cache", "ls", str(tmp_path)]) == 2
    assert "holds no prefixes" in capsys.readouterr().err


def test_a_prefix_ends_where_nothing_goes_on_and_shared_pages_are_nobody_s() -> None:
    def page(name: str, parent: str | None) -> Page:
        key, before = (hashlib.sha256((of or "").encode()).hexdigest() for of in (name, parent))
        return Page(Header(key, before if parent else None), 10, 0.0)

    def lengths(*pages: Page) -> list[tuple[int, int]]:
        return sorted((one.pages, one.own_bytes) for one in prefixes_of(pages))

    root, left, right = page("a", None), page("b", "a"), page("c", "a")
    longer = page("d", "c")
    assert lengths(root) == [(1, 10)]
    assert lengths(root, left) == [(2, 20)]
    assert lengths(root, left, right, longer) == [(2, 10), (3, 20)]
    # without its start it is of no use
    assert lengths(left) == [(0, 10)]
