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
from typing import Final

from cowshed.cache.errors import PeerError, SourceError

__all__ = ["SILENCE_SECONDS", "FileLink", "Link", "SocketLink", "open_link"]

SILENCE_SECONDS: Final = 30.0
_LOOK_SECONDS: Final = 0.1
_READ_BYTES: Final = 1 << 20


class Link:
    """Sends and receives bytes; calls look() while it waits, which may raise to end the wait."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look

    def send(self, raw: bytes) -> None:
        """Send all bytes."""
        raise NotImplementedError

    def receive(self) -> bytes:
        """Wait for some bytes and return them; b"" at the end."""
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
    ) -> None:
        """with_it() is called when the link is closed, to release the socket's origin."""
        super().__init__(look)
        self._with_it = with_it
        sock.setblocking(False)
        self._socket = sock
        self._silence_seconds = silence_seconds

    def send(self, raw: bytes) -> None:
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
        while True:
            try:
                return self._socket.recv(_READ_BYTES)
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

    def send(self, raw: bytes) -> None:
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


def open_link(fd: int, look: Callable[[], None] = lambda: None) -> SocketLink | FileLink:
    """Return a link over fd, a stream socket or a file, which it takes over."""
    if stat.S_ISSOCK(os.fstat(fd).st_mode):
        return SocketLink(socket.socket(fileno=fd), look)
    return FileLink(fd, look)
