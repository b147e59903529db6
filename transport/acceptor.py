# SPDX-License-Identifier: Apache-2.0
"""accept(2) that never leaves a loop spinning: a peer that cannot be taken is turned away."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from typing import Any, Final

__all__ = ["Acceptor"]

_NO_ROOM: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Acceptor:
    """Takes peers at listening sockets, which stay their owner's.

    Keeps one descriptor in reserve. Without it a peer that waits while there are no descriptors
    left could not even be refused, and would wake the loop for ever.
    """

    def __init__(self) -> None:
        self._reserve = _spare()

    def accept(self, listener: socket.socket) -> tuple[socket.socket, Any] | None:
        """Take a peer that waits, and its address; None if there is none, or it was turned away.

        Raises OSError only if listener is closed, or no socket.
        """
        try:
            return listener.accept()
        except OSError as error:
            if error.errno in _NO_ROOM:
                self._turn_away(listener)
            elif error.errno in (errno.EBADF, errno.EINVAL, errno.ENOTSOCK):
                raise
            return None  # nobody there, or gone again: accept(2) passes on errors of the network

    def _turn_away(self, listener: socket.socket) -> None:
        if self._reserve >= 0:
            os.close(self._reserve)
            self._reserve = -1
        with contextlib.suppress(OSError):
            listener.accept()[0].close()
        with contextlib.suppress(OSError):
            self._reserve = _spare()

    def close(self) -> None:
        """Give the reserve back; nothing twice."""
        if self._reserve >= 0:
            os.close(self._reserve)
            self._reserve = -1


def _spare() -> int:
    return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
