# SPDX-License-Identifier: Apache-2.0
"""Listening sockets that outlive the backend: clients wait for its successor, none is refused."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.parse import quote

from cowshed.cache.errors import CowshedError
from cowshed.service.persist.fd_store import FdStore
from cowshed.service.persist.inherited import InheritedFds, Kinds
from cowshed.service.runtime.logs import EventLog

__all__ = ["Listeners"]

_log = EventLog("cowshed.listeners")

_PREFIX: Final = "listen/"


class Listeners:
    """Opens listening sockets, or returns those inherited; all are held for the successor.

    fds are the sockets' descriptors, which stay open as long as the daemon serves.
    """

    def __init__(
        self, fd_store: FdStore | None = None, inherited: InheritedFds | None = None
    ) -> None:
        self._fd_store = fd_store or FdStore(None)
        self._inherited = inherited or InheritedFds({})
        self.fds: Final[set[int]] = set()
        self._paths: dict[str, Path] = {}
        self._removed: set[str] = set()
        self._kept: dict[str, Kinds] = {}

    def open(
        self, what: str, make: Callable[[], socket.socket], path: Path | None = None
    ) -> socket.socket:
        """Return the non-blocking socket that listens at `what`; the caller owns it.

        It is the inherited one, or make()'s if there is none. path is its place in the file system:
        if the path is gone, nobody can connect, and the socket is made anew; if that fails, the
        inherited one is used. Raises what make() raises if there is no inherited one.
        """
        group = _group(what)
        left = self._left(group)
        if left is None:
            sock = make()
        elif path is None or _is_socket(path):
            sock = left
        else:
            sock = self._make_again(group, left, what, make)
        if path is not None:
            self._paths[what] = path
        sock.setblocking(False)
        self.fds.add(sock.fileno())
        self._fd_store.keep(group, [sock.fileno()], listener=what)
        return sock

    def keep(self, what: str) -> None:
        """Keep holding the socket inherited for `what`, if any, unserved until open()."""
        group = _group(what)
        if (left := self._inherited.take(group)) is not None:
            self._kept[group] = left
            self._fd_store.keep(group, list(left.values()), listener=what)

    def close(self) -> None:
        """Close sockets that were kept and never opened; the supervisor still holds them."""
        for left in self._kept.values():
            for fd in left.values():
                os.close(fd)
        self._kept.clear()

    def look(self) -> None:
        """Log, once each, paths that were removed; may wait for a disk."""
        for what, path in list(self._paths.items()):
            if _is_socket(path):
                self._removed.discard(what)
            elif what not in self._removed:
                self._removed.add(what)
                _log.error(
                    "socket-removed",
                    "the socket's path was removed, and nobody can connect there: reload the "
                    "daemon (SIGHUP), which makes it again and disturbs no guest",
                    path=path,
                )

    def _make_again(
        self, group: str, left: socket.socket, what: str, make: Callable[[], socket.socket]
    ) -> socket.socket:
        try:
            sock = make()
        except (CowshedError, OSError) as error:
            _log.error("not-reachable", f"{error}; connected guests are served", listener=what)
            return left
        _log.warning("socket-made-again", "its path had been removed", listener=what)
        self._fd_store.release(group)
        left.close()
        return sock

    def _left(self, group: str) -> socket.socket | None:
        left = self._kept.pop(group, None) or self._inherited.take(group)
        if left is None:
            return None
        if left.keys() == {"socket"}:
            sock = socket.socket(fileno=left["socket"])
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return sock
            self._fd_store.release(group)
            sock.close()
            return None
        self._fd_store.release(group)
        for fd in left.values():
            os.close(fd)
        return None


def _group(what: str) -> str:
    # Group names allow few characters: quote as in a URI, and the colon too.
    return _PREFIX + quote(what, safe="/@[]")[:240]


def _is_socket(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.is_socket()
    return False
