# SPDX-License-Identifier: Apache-2.0
"""accept(2) that never leaves a loop spinning: peers are accepted even at the limit of open files.

A few descriptors are kept in reserve for that. Without them a waiting peer could be neither refused
nor accepted, and would wake the loop for ever.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import Any, Final

__all__ = ["NO_ROOM", "NR_SPARE", "Acceptor"]

NO_ROOM: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
NR_SPARE: Final = 4


class Acceptor:
    """Accepts peers at listening sockets, which stay their owner's.

    Invariant: _spare has NR_SPARE descriptors, less those that were spent on refused peers and are
    not refilled yet.
    """

    def __init__(self) -> None:
        self._spare: list[int] = []
        self.refill()

    def accept(self, listener: socket.socket) -> tuple[socket.socket, Any] | None:
        """Accept a waiting peer, with its address; None if none waits, or it was refused.

        Raises OSError only if listener is closed or not a socket.
        """
        taken = self.accept_any(listener)
        if taken is None or taken[2] == 0:
            return None if taken is None else taken[:2]
        taken[0].close()
        self.refill()
        return None

    def accept_any(self, listener: socket.socket) -> tuple[socket.socket, Any, int] | None:
        """Accept a waiting peer; return it, its address and 0, or the errno that leaves no room.

        A peer without room has a descriptor of the reserve: the caller must send it the reason,
        close it, and refill().
        """
        self.refill()
        try:
            return (*listener.accept(), 0)
        except OSError as error:
            if error.errno in NO_ROOM:
                return self._accept_with_spare(listener, error.errno)
            if error.errno in (errno.EBADF, errno.EINVAL, errno.ENOTSOCK):
                raise
            return None  # no peer waits, or it is gone: accept(2) passes on network errors

    def _accept_with_spare(
        self, listener: socket.socket, why: int
    ) -> tuple[socket.socket, Any, int] | None:
        if not self._spare:
            return None
        os.close(self._spare.pop())
        try:
            return (*listener.accept(), why)
        except OSError:
            self.refill()
            return None

    @property
    def has_spare(self) -> bool:
        """Whether a peer could be accepted for which there is no room."""
        return bool(self._spare)

    def refill(self) -> None:
        """Refill the reserve, as far as there are descriptors."""
        while len(self._spare) < NR_SPARE:
            try:
                self._spare.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
            except OSError:
                return

    def close(self) -> None:
        """Close the reserve. Idempotent."""
        while self._spare:
            os.close(self._spare.pop())
