"""The demo of prefixes: a real server, ended and started anew on the same disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hip_sglang.cli import run


@pytest.mark.soak
@pytest.mark.server
def test_questions_after_a_restart_find_what_was_read_before(tmp_path: Path) -> None:
    assert run(["demo", "--prefix", "--context", "16384", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "demo-prefix.json").read_text())
    assert report["lost"] == 0
    (cold, *warm), after = report["cached_tokens"]
    assert cold < 64
    known = report["document_tokens"] // 64 * 64 - 64
    assert min(*warm, *after) >= known
    assert report["ttft_s"][1][0] < report["ttft_s"][0][0]
