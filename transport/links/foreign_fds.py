# SPDX-License-Identifier: Apache-2.0
"""Descriptors of a peer's choosing, looked at and closed without waiting for who is behind them.

Two things that never wait on files of the kernel's own do so elsewhere. fstat(2) asks a FUSE server
for the attributes; statx(2) with AT_STATX_DONT_SYNC does not. close(2) asks it to flush, and the
last close of a socket waits for as long as its SO_LINGER says. So what is not known to close at
once is closed by a thread that nobody waits for. Each such thread may be stuck, hence their bound.
What waits for one is bounded too: while it is too much, nobody new is let in, and who sends more
is hung up on, so that peers cannot use up our descriptors. The kernel drops those that find no
room in a receive in the thread that receives: give them room, SCM_MAX_FDS.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections import deque
from typing import Final

__all__ = ["SCM_MAX_FDS", "close_foreign", "device_and_inode", "is_full"]

# The most that one message carries: net/scm.h, SCM_MAX_FD.
SCM_MAX_FDS: Final = 253
_MAX_THREADS: Final = 64
_MAX_WAITING: Final = 1024
# Names of what has no path; a file's begins with a slash, wherever it is mounted.
_CLOSED_AT_ONCE: Final = ("anon_inode:", "pipe:")

# linux/stat.h, linux/fcntl.h
_AT_EMPTY_PATH: Final = 0x1000
_AT_STATX_DONT_SYNC: Final = 0x4000
_STATX_INO: Final = 0x100
_STATX_BYTES: Final = 256
_INODE_AT, _DEVICE_AT = 32, 136

_libc = ctypes.CDLL(None, use_errno=True)


def device_and_inode(fd: int) -> tuple[int, int]:
    """Give what os.fstat(fd) has as st_dev and st_ino, asking no server. Raises OSError."""
    found = ctypes.create_string_buffer(_STATX_BYTES)
    flags = _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC
    if _libc.statx(fd, b"", flags, _STATX_INO, found) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))

    def word(at: int, nr_bytes: int = 4) -> int:
        return int.from_bytes(found.raw[at : at + nr_bytes], "little")

    return os.makedev(word(_DEVICE_AT), word(_DEVICE_AT + 4)), word(_INODE_AT, 8)


def close_foreign(fds: list[int]) -> None:
    """Close descriptors and empty the list; those that may wait are closed a moment later.

    One that fails to close is gone all the same.
    """
    later = []
    while fds:
        fd = fds.pop()
        if _closes_at_once(fd):
            with contextlib.suppress(OSError):
                os.close(fd)
        else:
            later.append(fd)
    if later:
        _closers.close(later)


def is_full() -> bool:
    """Whether so many descriptors wait to be closed that no more are to be taken from peers."""
    return _closers.nr_waiting >= _MAX_WAITING


def _closes_at_once(fd: int) -> bool:
    with contextlib.suppress(OSError):
        if os.readlink(f"/proc/self/fd/{fd}").startswith(_CLOSED_AT_ONCE):
            return True
        found = device_and_inode(fd)
        null = os.stat(os.devnull)
        return found[0] == os.stat("/proc").st_dev or found == (null.st_dev, null.st_ino)
    return False


class _Closers:
    """Invariant: while anything waits there are threads, up to _MAX_THREADS; idle ones end.

    nr_waiting counts what was given and is not closed yet.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[int] = deque()
        self._nr_threads = 0
        self.nr_waiting = 0

    def close(self, fds: list[int]) -> None:
        """Have descriptors closed."""
        with self._lock:
            self._waiting.extend(fds)
            self.nr_waiting += len(fds)
            if self._nr_threads == _MAX_THREADS:
                return
            self._nr_threads += 1
        try:
            threading.Thread(target=self._run, name="closer", daemon=True).start()
        except RuntimeError:  # no more threads: whoever closes next takes these along
            with self._lock:
                self._nr_threads -= 1

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._nr_threads -= 1
                    return
                fd = self._waiting.popleft()
            with contextlib.suppress(OSError):
                os.close(fd)
            with self._lock:
                self.nr_waiting -= 1


_closers: Final = _Closers()
