"""The servers of ``tests/server``."""

from tests.server.conftest import serve, tiny_llama

__all__ = ["serve", "tiny_llama"]
