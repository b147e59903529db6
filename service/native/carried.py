# SPDX-License-Identifier: Apache-2.0
"""Conversations that have no mapping, carried over to our successor when we leave on purpose.

Each is a group of its own, of a record and the socket, from shortly before our end until the
successor has it. What its peer said and we have not read is in the socket still.
"""

from __future__ import annotations

import os
import secrets
from typing import Final

from cowshed.service.runtime.logs import EventLog
from cowshed.service.survival.fd_store import FdStore
from cowshed.service.survival.inherited import InheritedFds, record_make, record_read
from cowshed.transport import Connection, adopt_connection

__all__ = ["CarriedOver"]

_log = EventLog("cowshed.sessions")

_PREFIX: Final = "session/"
_KINDS: Final = {"record", "socket"}


class CarriedOver:
    """Gives conversations to our successor, and has those of our predecessor."""

    def __init__(self, fd_store: FdStore) -> None:
        self._fd_store = fd_store
        self._records: dict[str, int] = {}

    def give(self, connection: Connection, *, is_greeted: bool) -> None:
        """Have a conversation outlive us; if nobody holds it by our end, it ends with us.

        So does one whose record there is no descriptor for.
        """
        try:
            record = record_make({"greeted": is_greeted})
        except OSError as error:
            _log.warning("not-held", str(error), pid=connection.peer.pid)
            return
        group = f"{_PREFIX}{secrets.token_hex(8)}"
        self._records[group] = record
        self._fd_store.hold(group, [record, connection.fileno()], pid=connection.peer.pid)

    def take_back(self) -> None:
        """We stay: the conversations are ours again."""
        for group, record in self._records.items():
            self._fd_store.release(group)
            os.close(record)
        self._records.clear()

    def take(self, inherited: InheritedFds) -> list[tuple[Connection, bool]]:
        """The conversations of our predecessor, the caller's, and whether each was greeted."""
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
