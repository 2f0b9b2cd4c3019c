"""The server that tests of all folders share."""

from tests.servers import serve, tiny_llama

__all__ = ["serve", "tiny_llama"]
