# SPDX-License-Identifier: Apache-2.0
"""Writes the log to a descriptor without ever waiting for its reader.

The reader may be slow or stuck: a pipe to a pager, a journal that hangs, a stopped terminal. A line
that cannot be written at once is lost.

O_NONBLOCK would not do: it belongs to the open file, which other processes share. So the sink
writes to a pipe with RWF_NOWAIT (Linux 6.4), to a socket with MSG_DONTWAIT, and reopens a terminal.
Files are written as usual: a disk has no reader to wait for.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
from collections.abc import Callable
from typing import Final

__all__ = ["LogSink"]

_RWF_NOWAIT: Final = 8  # linux/fs.h; os has it for reading alone


class LogSink:
    """Writes whole lines to a borrowed descriptor. Not thread-safe; the owner must close() it.

    Invariant: _rest is the unwritten rest of a line; it is written before anything else.
    """

    def __init__(self, fd: int) -> None:
        self._rest = b""
        self._own_fd = -1
        self._write: Final = self._writer(fd)

    def close(self) -> None:
        """Close the sink's own descriptor. Idempotent."""
        if self._own_fd >= 0:
            os.close(self._own_fd)
            self._own_fd = -1

    def write(self, line: bytes) -> bool:
        """Write a line, which must end with a newline; False if it is lost. Never waits."""
        try:
            if self._rest:
                self._rest = self._rest[self._write(self._rest) :]
            if not self._rest:
                self._rest = line[self._write(line) :]
                return True
        except OSError:
            pass
        return False

    def _writer(self, fd: int) -> Callable[[bytes], int]:
        try:
            mode = os.fstat(fd).st_mode
        except OSError:
            mode = 0
        if stat.S_ISFIFO(mode):
            return lambda line: os.pwritev(fd, [line], -1, _RWF_NOWAIT)
        if stat.S_ISSOCK(mode):
            self._own_fd = os.dup(fd)
            return self._send
        if stat.S_ISCHR(mode) and os.isatty(fd):
            how = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            with contextlib.suppress(OSError):  # another user's terminal: poll before each line
                self._own_fd = os.open(f"/proc/self/fd/{fd}", how)
                return lambda line: os.write(self._own_fd, line)
            return lambda line: os.write(fd, line) if _takes_more(fd) else _refuse()
        return lambda line: os.write(fd, line)

    def _send(self, line: bytes) -> int:
        # No socket object is kept: every fork would have to handle it.
        with socket.socket(fileno=os.dup(self._own_fd)) as sock:
            return sock.send(line, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def _takes_more(fd: int) -> bool:
    return bool(select.select([], [fd], [], 0)[1])


def _refuse() -> int:
    raise BlockingIOError
