# SPDX-License-Identifier: Apache-2.0
"""The links that carry a handoff's bytes: a socket to the other backend, or a file.

Calls block, in a thread of their own, but not for ever: each wait calls the owner's look() several
times a second, which raises at an abort or deadline, and a peer that is silent for too long is
lost.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import time
from collections.abc import Callable
from enum import Enum
from typing import Final, TypeVar

from cowshed.cache.errors import PeerError, SourceError

__all__ = ["SILENCE_SECONDS", "FileLink", "Link", "Reach", "SocketLink", "open_link"]

SILENCE_SECONDS: Final = 30.0
_LOOK_SECONDS: Final = 0.1
_READ_BYTES: Final = 1 << 20
_SEND_BYTES: Final = 4 << 20
_SO_SNDBUFFORCE: Final = 32  # asm-generic/socket.h

_Received = TypeVar("_Received")


class Reach(Enum):
    """Where a link leads; a sender decides by it whether to compress."""

    FILE = "file"
    HOST = "host"
    NETWORK = "network"


class Link:
    """Sends and receives bytes; calls look() while it waits, which may raise to end the wait."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look

    reach = Reach.FILE

    def send(self, raw: bytes | memoryview) -> None:
        """Send all bytes."""
        raise NotImplementedError

    def receive(self) -> bytes:
        """Wait for some bytes and return them; b"" at the end."""
        raise NotImplementedError

    def receive_into(self, room: memoryview) -> int:
        """Wait for some bytes, put them into room and return how many; 0 at the end."""
        raise NotImplementedError

    def has_come(self) -> bool:
        """Whether receive() would return at once."""
        return True

    def close(self) -> None:
        """Close the link; idempotent."""
        raise NotImplementedError


class SocketLink(Link):
    """A connected stream socket, owned. PeerError for a peer that is gone or silent."""

    def __init__(
        self,
        sock: socket.socket,
        look: Callable[[], None] = lambda: None,
        silence_seconds: float = SILENCE_SECONDS,
        with_it: Callable[[], None] = lambda: None,
        *,
        is_relayed: bool = False,
    ) -> None:
        """with_it() is called when the link is closed, to release the socket's origin.

        is_relayed: the socket leads to a relay, and the peer is elsewhere.
        """
        super().__init__(look)
        self._with_it = with_it
        self.reach = Reach.HOST if not is_relayed and _is_local(sock) else Reach.NETWORK
        _enlarge(sock)
        sock.setblocking(False)
        self._socket = sock
        self._silence_seconds = silence_seconds

    def send(self, raw: bytes | memoryview) -> None:
        """Send all bytes. Raises PeerError."""
        left = memoryview(raw)
        while left:
            try:
                left = left[self._socket.send(left, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                self._wait(select.POLLOUT, "took nothing")
            except OSError as error:
                raise PeerError(f"the other end is gone: {error.strerror}") from error

    def receive(self) -> bytes:
        """Wait for some bytes and return them; b"" once the peer has closed. Raises PeerError."""
        return self._when_come(lambda: self._socket.recv(_READ_BYTES))

    def receive_into(self, room: memoryview) -> int:
        """Wait for some bytes, as receive() does, and put them into room."""
        return self._when_come(lambda: self._socket.recv_into(room))

    def _when_come(self, receive: Callable[[], _Received]) -> _Received:
        while True:
            try:
                return receive()
            except BlockingIOError:
                self._wait(select.POLLIN, "sent nothing")
            except OSError as error:
                raise PeerError(f"the other end is gone: {error.strerror}") from error

    def has_come(self) -> bool:
        """Whether bytes are here, or the peer has closed."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def receive_now(self) -> bytes:
        """Return the bytes already here, perhaps b"". Raises PeerError once the peer has closed."""
        try:
            raw = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return b""
        except OSError as error:
            raise PeerError(f"the other end is gone: {error.strerror}") from error
        if not raw:
            raise PeerError("the other end is gone: it hung up")
        return raw

    def close(self) -> None:
        """Close the socket."""
        if self._socket.fileno() >= 0:
            self._socket.close()
            self._with_it()

    def _wait(self, event: int, what: str) -> None:
        poll = select.poll()
        poll.register(self._socket, event)
        deadline = time.monotonic() + self._silence_seconds
        while not poll.poll(_LOOK_SECONDS * 1000):
            self._look()
            if time.monotonic() > deadline:
                raise PeerError(f"the other end {what} for {self._silence_seconds:g} s")


class FileLink(Link):
    """A file, pipe or device, owned. Raises SourceError; only calls look() between operations."""

    def __init__(self, fd: int, look: Callable[[], None] = lambda: None) -> None:
        super().__init__(look)
        self._fd = fd

    def send(self, raw: bytes | memoryview) -> None:
        """Write all bytes."""
        left = memoryview(raw)
        try:
            while left:
                self._look()
                left = left[os.write(self._fd, left) :]
        except OSError as error:
            raise SourceError(f"cannot write the file: {error.strerror}; make room") from error

    def receive(self) -> bytes:
        """Read some bytes; b"" at the end."""
        self._look()
        try:
            return os.read(self._fd, _READ_BYTES)
        except OSError as error:
            raise SourceError(f"cannot read the file: {error.strerror}") from error

    def receive_into(self, room: memoryview) -> int:
        """Read some bytes into room; 0 at the end."""
        self._look()
        try:
            return os.readv(self._fd, [room])
        except OSError as error:
            raise SourceError(f"cannot read the file: {error.strerror}") from error

    def cut(self, nr_bytes: int) -> None:
        """Truncate the file to nr_bytes, and continue there."""
        try:
            os.ftruncate(self._fd, nr_bytes)
            os.lseek(self._fd, nr_bytes, os.SEEK_SET)
        except OSError as error:
            raise SourceError(f"cannot truncate the file: {error.strerror}") from error

    def make_durable(self) -> None:
        """Sync the file; returns once it survives a power cut."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise SourceError(f"cannot write the file: {error.strerror}; make room") from error

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _is_local(sock: socket.socket) -> bool:
    """Whether the peer is on this host: by a unix socket, or at our own address."""
    if sock.family == socket.AF_UNIX:
        return True
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    try:
        return bool(sock.getsockname()[0] == sock.getpeername()[0])
    except OSError:  # it is gone already
        return False


def _enlarge(sock: socket.socket) -> None:
    """Make room for two large frames in the socket, so that the two ends work at the same time.

    The kernel sizes those of tcp by itself.
    """
    if sock.family != socket.AF_UNIX:
        return
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SEND_BYTES)
    except OSError:  # not privileged: up to the system's limit
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)


def open_link(fd: int, look: Callable[[], None] = lambda: None) -> SocketLink | FileLink:
    """Return a link over fd, a stream socket or a file, which it takes over."""
    if stat.S_ISSOCK(os.fstat(fd).st_mode):
        return SocketLink(socket.socket(fileno=fd), look)
    return FileLink(fd, look)
