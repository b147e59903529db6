# SPDX-License-Identifier: Apache-2.0
"""Inspect and close descriptors that a peer sent, without waiting for a file server behind them.

Two system calls may block on files that are not the kernel's own. fstat(2) asks a FUSE server for
the attributes; statx(2) with AT_STATX_DONT_SYNC does not. close(2) asks it to flush, and the last
close of a socket waits as long as its SO_LINGER. So a thread of its own closes every descriptor
that may block. Such a thread may be stuck for ever, so their number is bounded, and so is the
number of descriptors that wait for one: at that bound new peers are refused, and peers that send
more are disconnected, so that they cannot use up our descriptors. The kernel closes descriptors
that do not fit a receive's buffer in the receiving thread: always receive with room for
SCM_MAX_FDS.
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
# Names of files without a path; the link of any other file begins with a slash.
_CLOSED_AT_ONCE: Final = ("anon_inode:", "pipe:")

# linux/stat.h, linux/fcntl.h
_AT_EMPTY_PATH: Final = 0x1000
_AT_STATX_DONT_SYNC: Final = 0x4000
_STATX_INO: Final = 0x100
_STATX_BYTES: Final = 256
_INODE_AT, _DEVICE_AT = 32, 136

_libc = ctypes.CDLL(None, use_errno=True)


def device_and_inode(fd: int) -> tuple[int, int]:
    """Return st_dev and st_ino as os.fstat(fd) does, but ask no file server. Raises OSError."""
    found = ctypes.create_string_buffer(_STATX_BYTES)
    flags = _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC
    if _libc.statx(fd, b"", flags, _STATX_INO, found) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))

    def word(at: int, nr_bytes: int = 4) -> int:
        return int.from_bytes(found.raw[at : at + nr_bytes], "little")

    return os.makedev(word(_DEVICE_AT), word(_DEVICE_AT + 4)), word(_INODE_AT, 8)


def close_foreign(fds: list[int]) -> None:
    """Close descriptors and empty the list; a thread closes those that may block.

    A descriptor whose close fails is gone all the same.
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
    """Whether too many descriptors wait to be closed for any more to be accepted from peers."""
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
    """Threads that close descriptors: at most _MAX_THREADS, which end when none waits.

    nr_waiting counts the descriptors that are not closed yet.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[int] = deque()
        self._nr_threads = 0
        self.nr_waiting = 0

    def close(self, fds: list[int]) -> None:
        """Queue descriptors to be closed."""
        with self._lock:
            self._waiting.extend(fds)
            self.nr_waiting += len(fds)
            if self._nr_threads == _MAX_THREADS:
                return
            self._nr_threads += 1
        try:
            threading.Thread(target=self._run, name="closer", daemon=True).start()
        except RuntimeError:  # no thread can be started: the next one closes these too
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
