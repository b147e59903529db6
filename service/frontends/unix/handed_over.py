# SPDX-License-Identifier: Apache-2.0
"""Connections without a mapping, handed over to the successor at a graceful shutdown.

Each is a group of its own, a record and the socket, from shortly before the end of this process
until the successor has it. Bytes that nobody has read yet stay in the socket.
"""

from __future__ import annotations

import os
import secrets
from typing import Final

from cowshed.service.persist.fd_store import FdStore
from cowshed.service.persist.inherited import InheritedFds, record_make, record_read
from cowshed.service.runtime.logs import EventLog
from cowshed.transport import Connection, adopt_connection

__all__ = ["HandedOver"]

_log = EventLog("cowshed.sessions")

_PREFIX: Final = "session/"
_KINDS: Final = {"record", "socket"}


class HandedOver:
    """Hands connections over to the successor, and takes those that the last backend gave."""

    def __init__(self, fd_store: FdStore) -> None:
        self._fd_store = fd_store
        self._records: dict[str, int] = {}

    def give(self, connection: Connection, *, is_greeted: bool) -> None:
        """Have the keeper hold a connection for the successor.

        The connection ends with this process if the keeper does not hold it by then, or if no
        descriptor is left for its record.
        """
        try:
            record = record_make({"greeted": is_greeted})
        except OSError as error:
            _log.warning("not-held", str(error), pid=connection.peer.pid)
            return
        group = f"{_PREFIX}{secrets.token_hex(8)}"
        self._records[group] = record
        self._fd_store.keep(group, [record, connection.fileno()], pid=connection.peer.pid)

    def take_back(self) -> None:
        """Have the keeper release all connections; this process continues."""
        for group, record in self._records.items():
            self._fd_store.release(group)
            os.close(record)
        self._records.clear()

    def take(self, inherited: InheritedFds) -> list[tuple[Connection, bool]]:
        """Return the connections handed over, now the caller's, and whether each was greeted."""
        taken = []
        for group, left in inherited.take_all(_PREFIX):
            self._fd_store.release(group)
            if left.keys() != _KINDS:
                for fd in left.values():
                    os.close(fd)
                continue
            is_greeted = bool(record_read(left["record"])["greeted"])
            os.close(left["record"])
            taken.append((adopt_connection(left["socket"]), is_greeted))
        return taken
