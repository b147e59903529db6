# SPDX-License-Identifier: Apache-2.0
"""The way that a handoff's bytes take: a socket to the other backend, or a file.

Whoever uses it is in a thread of its own and may wait, but never for ever: each wait looks at what
the owner says (an abort, a deadline) several times a second, and a peer that is silent for too long
is a lost peer.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import time
from collections.abc import Callable
from typing import Final

from cowshed.cache.errors import PeerError, SourceError

__all__ = ["SILENCE_SECONDS", "FileLink", "Link", "SocketLink", "open_link"]

SILENCE_SECONDS: Final = 30.0
_LOOK_SECONDS: Final = 0.1
_READ_BYTES: Final = 1 << 20


class Link:
    """Sends and receives bytes; look() is called while it waits, and may raise to end the wait."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look

    def send(self, raw: bytes) -> None:
        """Send all of it."""
        raise NotImplementedError

    def receive(self) -> bytes:
        """Wait for some bytes; b"" at the end of them."""
        raise NotImplementedError

    def has_come(self) -> bool:
        """Whether receive() would not wait."""
        return True

    def close(self) -> None:
        """Let go of it; nothing twice."""
        raise NotImplementedError


class SocketLink(Link):
    """A connected stream socket, owned. PeerError for a peer that is gone or silent."""

    def __init__(
        self,
        sock: socket.socket,
        look: Callable[[], None] = lambda: None,
        silence_seconds: float = SILENCE_SECONDS,
        with_it: Callable[[], None] = lambda: None,
    ) -> None:
        """with_it() is called when it is closed, for what the socket came by."""
        super().__init__(look)
        self._with_it = with_it
        sock.setblocking(False)
        self._socket = sock
        self._silence_seconds = silence_seconds

    def send(self, raw: bytes) -> None:
        """Send all of it; PeerError."""
        left = memoryview(raw)
        while left:
            try:
                left = left[self._socket.send(left, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                self._wait(select.POLLOUT, "took nothing")
            except OSError as error:
                raise PeerError(f"the other end is gone: {error.strerror}") from error

    def receive(self) -> bytes:
        """Wait for some bytes; b"" once the peer has closed. PeerError."""
        while True:
            try:
                return self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                self._wait(select.POLLIN, "said nothing")
            except OSError as error:
                raise PeerError(f"the other end is gone: {error.strerror}") from error

    def has_come(self) -> bool:
        """Whether something is here, or the peer has closed."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def receive_now(self) -> bytes:
        """Give what has come already, b"" if that is nothing. PeerError once nothing more can."""
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
    """A regular file, or whatever else can be read or written, owned. SourceError."""

    def __init__(self, fd: int, look: Callable[[], None] = lambda: None) -> None:
        super().__init__(look)
        self._fd = fd

    def send(self, raw: bytes) -> None:
        """Write all of it."""
        left = memoryview(raw)
        try:
            while left:
                self._look()
                left = left[os.write(self._fd, left) :]
        except OSError as error:
            raise SourceError(f"cannot write the file: {error.strerror}; make room") from error

    def receive(self) -> bytes:
        """Read some of it."""
        self._look()
        try:
            return os.read(self._fd, _READ_BYTES)
        except OSError as error:
            raise SourceError(f"cannot read the file: {error.strerror}") from error

    def cut(self, nr_bytes: int) -> None:
        """Go on behind the first nr_bytes of the file, which has no more from then on."""
        try:
            os.ftruncate(self._fd, nr_bytes)
            os.lseek(self._fd, nr_bytes, os.SEEK_SET)
        except OSError as error:
            raise SourceError(f"cannot cut the file: {error.strerror}") from error

    def make_durable(self) -> None:
        """Return once what was written survives a power cut."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise SourceError(f"cannot write the file: {error.strerror}; make room") from error

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def open_link(fd: int, look: Callable[[], None] = lambda: None) -> SocketLink | FileLink:
    """Give a link over a descriptor, which it takes over: a stream socket, or a file."""
    if stat.S_ISSOCK(os.fstat(fd).st_mode):
        return SocketLink(socket.socket(fileno=fd), look)
    return FileLink(fd, look)
