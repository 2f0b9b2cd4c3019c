"""Asks a running supervisor, and reads its log."""

from __future__ import annotations

import os
import time
from typing import Any

import httpx

from hip_cluster import state

TOKEN_VARIABLE = "HIP_SGLANG_TOKEN"


def ask(
    name: str, method: str, path: str, url: str | None = None, body: dict[str, int] | None = None
) -> dict[str, Any]:
    """One question to an endpoint's supervisor. Raises ValueError, in one line, where it fails."""
    if url is None:
        door = state.read_door(name)
        url, token = door.url, door.token
    else:
        token = os.environ.get(TOKEN_VARIABLE, "")
    try:
        answer = httpx.request(
            method, url + path, json=body, headers={"Authorization": f"Bearer {token}"}, timeout=30
        )
        content: dict[str, Any] = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise ValueError(f"the supervisor of {name} does not answer at {url}: {error}") from None
    if answer.is_error:
        raise ValueError(f"{name}: {content.get('error', answer.reason_phrase)}")
    return content


def print_log(name: str, file: str, follow: bool) -> None:
    """Raises ValueError where there is no log."""
    path = state.home() / name / file
    if not path.is_file():
        raise ValueError(f"there is no log of {name!r} here ({path})")
    with path.open(errors="replace") as log:
        while True:
            for line in log:
                print(line, end="", flush=True)
            if not follow:
                return
            time.sleep(0.5)
