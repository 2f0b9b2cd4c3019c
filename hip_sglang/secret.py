"""Keys that do not show themselves."""

from __future__ import annotations

import hmac


class Secret(str):
    """A string whose ``repr`` says nothing, for SGLang writes its arguments into its log."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"

    def matches(self, other: str) -> bool:
        """Whether they are equal, in a time that does not tell how much of them is."""
        return hmac.compare_digest(self.encode(), other.encode())
