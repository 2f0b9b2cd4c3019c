"""Ports: one that is free, and a clear word about one that is taken."""

from __future__ import annotations

import errno
import socket


def free_port(host: str) -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def require_free(host: str, port: int, key: str) -> None:
    """Raise ValueError, naming the document's ``key``, where nobody can listen at host:port."""
    with socket.socket() as probe:
        # servers set this too: a port in TIME_WAIT is free
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ValueError(
                    f"{key}={port} is in use on {host}; stop the program that listens there, or "
                    "choose another"
                ) from None
            raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}") from None
