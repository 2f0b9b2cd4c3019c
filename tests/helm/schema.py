"""Walks the chart's schema: every value that it knows, and values that it must refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.helm import chart

SCHEMA = json.loads((chart.CHART / "values.schema.json").read_text(encoding="utf-8"))
# a value of each type; a wrong one is of a type that is not allowed
OF_TYPE = {
    "string": "words",
    "integer": 7,
    "number": 0.5,
    "boolean": True,
    "array": [],
    "object": {},
}


@dataclass(frozen=True)
class Wrong:
    """One value that must be refused."""

    path: tuple[str, ...]
    value: Any
    why: str

    @property
    def name(self) -> str:
        return f"{'.'.join(self.path) or 'root'}: {self.why}"

    @property
    def values(self) -> dict[str, Any]:
        return chart.at(".".join(self.path), self.value) if self.path else self.value

    def is_named_in(self, message: str) -> bool:
        """Whether the error tells where the value stands, in the words of either helm."""
        if not self.path:
            return "surprise" in message
        return any(sign.join(self.path) in message for sign in ("/", "."))


def resolve(node: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        node = SCHEMA["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return node


def nodes(
    node: dict[str, Any] = SCHEMA, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every place that a values file can name, as (path, schema)."""
    node = resolve(node)
    yield path, node
    for key, child in node.get("properties", {}).items():
        if (*path, key) != ("global",):
            yield from nodes(child, (*path, key))


def wrong_values() -> Iterator[Wrong]:
    for path, node in nodes():
        types = node.get("type", [])
        types = [types] if isinstance(types, str) else types
        if types and path:
            allowed = {*types, *(["integer"] if "number" in types else [])}
            bad = next(kind for kind in ("object", "string", "integer") if kind not in allowed)
            yield Wrong(path, OF_TYPE[bad] if bad != "object" else {"a": 1}, "wrong type")
        if node.get("additionalProperties") is False:
            yield Wrong(path, {"surprise": 1}, "unknown key")
        yield from _oversteps(path, node)
        if "items" in node:
            for wrong in _wrong_items(resolve(node["items"])):
                yield Wrong(path, [wrong], "wrong item")


def _oversteps(path: tuple[str, ...], node: dict[str, Any]) -> Iterator[Wrong]:
    if "minimum" in node:
        yield Wrong(path, node["minimum"] - 1, "below its minimum")
    if "exclusiveMinimum" in node:
        yield Wrong(path, node["exclusiveMinimum"], "at its exclusive minimum")
    if "maximum" in node:
        yield Wrong(path, node["maximum"] + 1, "above its maximum")
    if "multipleOf" in node:
        yield Wrong(path, node["multipleOf"] + 1, "no multiple")
    if "enum" in node or "const" in node:
        yield Wrong(path, "surprise", "not one of its words")
    if "pattern" in node:
        yield Wrong(path, "Ü ?", "outside its pattern")
    if "maxLength" in node:
        yield Wrong(path, "a" * (node["maxLength"] + 1), "too long")
    if node.get("minLength"):
        yield Wrong(path, "", "empty")
    if node.get("minItems"):
        yield Wrong(path, [], "empty list")


def _wrong_items(item: dict[str, Any]) -> Iterator[Any]:
    yield 7 if item.get("type") != "integer" else "words"
    if item.get("additionalProperties") is False:
        good = dict.fromkeys(item.get("required", []), "a")
        yield {**good, "surprise": 1}
    for key in item.get("required", []):
        yield {other: "a" for other in item["required"] if other != key}
