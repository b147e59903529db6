# SPDX-License-Identifier: Apache-2.0
"""Listening sockets that outlive us: who connects while nobody serves waits, and is not refused."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.parse import quote

from cowshed.service.survival.fd_store import FdStore
from cowshed.service.survival.remains import Remains

__all__ = ["Listeners"]

_PREFIX: Final = "listen/"


class Listeners:
    """Opens listening sockets, or gives back those that our predecessor had; all are held.

    fds are the sockets'; they stay open for as long as we serve.
    """

    def __init__(self, fd_store: FdStore | None = None, remains: Remains | None = None) -> None:
        self._fd_store = fd_store or FdStore(None)
        self._remains = remains or Remains({})
        self.fds: Final[set[int]] = set()

    def open(
        self, what: str, make: Callable[[], socket.socket], path: Path | None = None
    ) -> socket.socket:
        """Give the socket that listens at what, not blocking, the caller's; make() gives a new one.

        path is where it is in the file system: one whose path is gone cannot be reached and is
        made anew. Raises what make() does.
        """
        # Not every name may be a group's: as in a URI, but for the colon.
        group = _PREFIX + quote(what, safe="/@[]")[:240]
        sock = self._left(group, path)
        if sock is None:
            sock = make()
        sock.setblocking(False)
        self.fds.add(sock.fileno())
        self._fd_store.hold(group, [sock.fileno()], listener=what)
        return sock

    def _left(self, group: str, path: Path | None) -> socket.socket | None:
        left = self._remains.take(group)
        if left is None:
            return None
        if left.keys() == {"socket"}:
            sock = socket.socket(fileno=left["socket"])
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and (
                path is None or _is_socket(path)
            ):
                return sock
            self._fd_store.release(group)
            sock.close()
            return None
        self._fd_store.release(group)
        for fd in left.values():
            os.close(fd)
        return None


def _is_socket(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.is_socket()
    return False
