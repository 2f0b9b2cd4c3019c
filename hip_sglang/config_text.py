"""The text of a configuration: reading it, and what to say where it is wrong."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hip_kernels.layout import PAGE_SIZE
from pydantic import BaseModel


class ConfigError(ValueError):
    """A configuration that cannot be used; its message is one line for the person who wrote it."""


def read(source: str | Path | Mapping[str, Any] | None) -> tuple[dict[str, Any], str]:
    """The values given, and the prefix that tells where they come from."""
    if source is None:
        return {}, ""
    if isinstance(source, Mapping):
        return dict(source), "hip_config: "
    if isinstance(source, str) and source.lstrip().startswith(("{", "[")):
        return parse(source, "--hip-config: "), "--hip-config: "
    origin = f"--hip-config {source}: "
    try:
        text = Path(source).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{origin}{error.strerror or error}; give a JSON file, "
            'or the JSON itself such as {"budget": 4096}'
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{origin}not a text file; give a JSON file in UTF-8") from None
    return parse(text, origin), origin


def parse(text: str, origin: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"{origin}{key!r} is given twice; keep one")
        return dict(pairs)

    try:
        values = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{origin}not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}; "
            "mend it there"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f'{origin}expected a JSON object such as {{"budget": 4096}}')
    return values


def explain(detail: Any, model: type[BaseModel]) -> str:
    """One problem that pydantic found: the key, what is wrong with it, and the remedy."""
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        *path, last = detail["loc"]
        fields = _fields(model, path)
        near = [
            ".".join([*map(str, path), name])
            for name in difflib.get_close_matches(last, fields, n=3)
        ]
        known = ", ".join(fields)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the keys are {known}"
        return f"unknown key {key!r}; {hint}"
    if detail["type"] == "missing":
        return f"{key} is missing; give it"
    if detail["type"] == "cannot_be":
        return str(detail["msg"])
    given = f"{key}={detail['input']!r}"
    if detail["type"] == "model_type":
        return f"{given} is not an object of settings; give it as one"
    if detail["type"] == "greater_than":
        return f"{given} is too small; set {key} to more than {detail['ctx']['gt']:g}"
    if detail["type"] == "greater_than_equal":
        least = detail["ctx"]["ge"]
        unit = f" (one page of {PAGE_SIZE} tokens)" if least == PAGE_SIZE else ""
        return f"{given} is too small; set {key} to {least}{unit} or more"
    if detail["type"] == "less_than_equal":
        return f"{given} is too large; set {key} to {detail['ctx']['le']} or less"
    if detail["type"].startswith("float_"):
        return f"{given} is not a number; set {key} to a number"
    if detail["type"] == "literal_error":
        return f"{given} is not known; choose {detail['ctx']['expected']}"
    if detail["type"].startswith("int_"):
        return f"{given} is not a whole number; set {key} to a number of tokens"
    if detail["type"].startswith("bool_"):
        return f"{given} is neither true nor false; set {key} to one of them"
    return f"{given}: {detail['msg']}; see {key} in the configuration's schema"


def _fields(model: type[BaseModel], path: list[str | int]) -> list[str]:
    """The names of the settings below ``path``."""
    schema = model.model_json_schema()
    at = schema
    for name in path:
        if isinstance(name, int):  # one of a list
            continue
        options = at["properties"][name]
        options = options.get("items", options)
        reference = next(o["$ref"] for o in options.get("anyOf", [options]) if "$ref" in o)
        at = schema["$defs"][reference.rsplit("/", 1)[1]]
    return list(at["properties"])
