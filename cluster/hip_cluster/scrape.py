"""One scrape of a server has what all of its ranks count, those on other machines too.

prometheus_client adds up files of one folder. A rank on another machine has a folder of its own;
before a scrape the server asks for what is in there, and puts it beside its own files.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
ANSWER_SECONDS = 2.0
END = b""

Address = tuple[str, int]


class Shelf:
    """A rank's counters, for the one server that knows ``secret``. Made before SGLang is imported,
    for the folder is in the environment then."""

    def __init__(self, host: str, secret: str) -> None:
        self.folder = tempfile.mkdtemp(prefix="hip_cluster_metrics_")
        os.environ[FOLDER_VARIABLE] = self.folder
        self._listener = Listener((host, 0), authkey=secret.encode())
        found = self._listener.address
        self.address: Address = (str(found[0]), int(found[1]))
        threading.Thread(target=self._serve, name="metrics-shelf", daemon=True).start()

    def _serve(self) -> None:
        connection = self._accept()
        try:
            while True:
                connection.recv_bytes()
                for path in sorted(Path(self.folder).glob("*.db")):
                    connection.send_bytes(path.name.encode())
                    connection.send_bytes(path.read_bytes())
                connection.send_bytes(END)
        except (OSError, EOFError):
            return

    def _accept(self) -> Connection:
        while True:
            try:
                connection = self._listener.accept()
            except (AuthenticationError, OSError, EOFError):
                # a stranger
                continue
            # there is one server, and it is here
            self._listener.close()
            return connection


class Shelves:
    """The counters of ranks on other machines, by rank."""

    def __init__(self, addresses: Iterable[tuple[int, Address]], secret: str) -> None:
        """Connect to each. Raises OSError where one does not answer."""
        key = secret.encode()
        self._connections = {rank: Client(address, authkey=key) for rank, address in addresses}
        self._fetching = threading.Lock()

    def fetch(self) -> None:
        """Put what they have now beside this process' own; a rank that died keeps its last."""
        if not self._connections:
            return
        folder = Path(os.environ[FOLDER_VARIABLE])
        with self._fetching:
            for rank, connection in list(self._connections.items()):
                try:
                    _fetch(connection, rank, folder)
                except (OSError, EOFError):
                    # its wire tells the supervisor
                    del self._connections[rank]


def pattern(folder: str) -> str:
    """What ``fetch`` leaves in a folder."""
    return f"{folder}/*-rank*.db*"


def _fetch(connection: Connection, rank: int, folder: Path) -> None:
    connection.send_bytes(b"?")
    while True:
        if not connection.poll(ANSWER_SECONDS):
            raise TimeoutError
        name = connection.recv_bytes()
        if name == END:
            return
        # TYPE_PID.db: processes of two machines may have one number
        path = folder / f"{name.decode().removesuffix('.db')}-rank{rank}.db"
        new = path.with_suffix(".db.new")
        new.write_bytes(connection.recv_bytes())
        # somebody may be reading
        new.replace(path)
