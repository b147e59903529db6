# SPDX-License-Identifier: Apache-2.0
"""Listen at and connect to unix:///absolute/path; connection.py has the connection."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
from typing import Final

from cowshed.cache.errors import PeerError, UsageError
from cowshed.transport.links.acceptor import Acceptor
from cowshed.transport.links.connection import EOF, Connection, Peer, Received
from cowshed.transport.messages.protocol import MAX_REPLY_BYTES, MAX_REQUEST_BYTES

__all__ = [
    "EOF",
    "Connection",
    "Listener",
    "Peer",
    "Received",
    "adopt_connection",
    "adopt_listener",
    "connect",
    "listen",
    "listen_socket",
    "parse_uri",
]

_SCHEME: Final = "unix://"
# sockaddr_un: 108 bytes with the closing NUL.
_MAX_PATH_BYTES: Final = 107
_TIMEVAL: Final = struct.Struct("ll")
CONNECT_SECONDS: Final = 10.0


class Listener:
    """A listening socket at a path, owned: close() closes it and removes the path."""

    def __init__(self, sock: socket.socket, path: str) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._path = path
        self.uri: Final = f"{_SCHEME}{path}"
        self._inode = 0
        with contextlib.suppress(OSError):  # the path may have been removed
            self._inode = os.stat(path).st_ino
        self._acceptor: Final = Acceptor()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the socket's descriptor, -1 once closed."""
        return self._socket.fileno()

    def accept(self) -> Connection | None:
        """Accept a waiting peer; None if none waits, or it had to be refused."""
        connection = self.accept_any()
        if connection is None or not connection.no_room:
            return connection
        connection.close()
        self._acceptor.refill()
        return None

    def accept_any(self) -> Connection | None:
        """Accept a waiting peer, even one that must be refused (no_room set); None if none waits.

        The caller must send a refused peer the reason, close it, and refill().
        """
        taken = self._acceptor.accept_any(self._socket)
        if taken is None:
            return None
        connection = Connection(taken[0], MAX_REQUEST_BYTES, MAX_REPLY_BYTES)
        connection.no_room = taken[2] or connection.look_at_peer()
        return connection

    def refill(self) -> None:
        """Refill the reserve of descriptors, after a refused peer was closed."""
        self._acceptor.refill()

    def close(self) -> None:
        """Close the socket, and remove its path if that is still this socket's. Idempotent."""
        if self._socket.fileno() < 0:
            return
        self._socket.close()
        self._acceptor.close()
        with contextlib.suppress(OSError):
            if os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)


def parse_uri(uri: str) -> str:
    """Return the path of a unix:///absolute/path; UsageError for anything else."""
    if not uri.startswith(_SCHEME):
        raise UsageError(f"cannot use {uri!r}: write unix:///absolute/path")
    path = uri.removeprefix(_SCHEME)
    if not path.startswith("/") or "\0" in path:
        raise UsageError(f"{uri!r} has no absolute path; write unix:///absolute/path")
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise UsageError(f"socket path {path!r} is over {_MAX_PATH_BYTES} bytes; use a shorter one")
    return path


def connect(uri: str, timeout: float = CONNECT_SECONDS) -> Connection:
    """Connect, to send requests and receive replies.

    Raises UsageError for a uri that cannot be used, PeerError if nobody answers there.
    """
    path = parse_uri(uri)
    sock = _new_socket()
    # Bounds the wait for room in the listener's backlog; this connect waits for nothing else.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(timeout))
    try:
        sock.connect(path)
    except OSError as error:
        sock.close()
        raise PeerError(
            f"cannot connect to {uri}: {error.strerror}; is the backend running?"
        ) from error
    return Connection(sock, MAX_REPLY_BYTES, MAX_REQUEST_BYTES)


def _timeval(seconds: float) -> bytes:
    # Zero would mean no timeout.
    microseconds = max(1, int(seconds * 1e6))
    return _TIMEVAL.pack(microseconds // 1_000_000, microseconds % 1_000_000)


def listen(uri: str, mode: int = 0o666, backlog: int = 128) -> Listener:
    """Listen, as listen_socket() does."""
    return Listener(listen_socket(uri, mode, backlog), parse_uri(uri))


def listen_socket(uri: str, mode: int = 0o666, backlog: int = 128) -> socket.socket:
    """Return a listening socket; users with write permission by mode may connect.

    A path left behind by a dead listener is replaced; a live listener's, or one that is not a
    socket, is a UsageError. Callers must use a lock to keep two from starting at once.
    """
    path = parse_uri(uri)
    _remove_stale(uri, path)
    sock = _new_socket()
    try:
        # bind() gives the path the socket's mode less the umask: closed to others until the chmod.
        os.fchmod(sock.fileno(), mode & 0o700)
        sock.bind(path)
        os.chmod(path, mode)
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        raise UsageError(f"cannot listen at {uri}: {error.strerror}") from error
    return sock


def adopt_connection(fd: int) -> Connection:
    """Go on with the backend's end of a connection that a dead process had; takes fd over."""
    return Connection(socket.socket(fileno=fd), MAX_REQUEST_BYTES, MAX_REPLY_BYTES)


def adopt_listener(uri: str, fd: int) -> Listener:
    """Go on listening with a socket that listens at uri; takes fd over."""
    return Listener(socket.socket(fileno=fd), parse_uri(uri))


def _remove_stale(uri: str, path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.stat(path, follow_symlinks=False).st_mode):
            raise UsageError(f"cannot listen at {uri}: {path} is there and is no socket; move it")
    except OSError:
        return
    probe = _new_socket()
    probe.setblocking(False)
    try:
        probe.connect(path)
    except (ConnectionRefusedError, FileNotFoundError):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        return
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EPROTOTYPE):
            raise UsageError(f"cannot listen at {uri}: {error.strerror}") from error
    finally:
        probe.close()
    raise UsageError(f"cannot listen at {uri}: another process does; stop it or use another path")


def _new_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
