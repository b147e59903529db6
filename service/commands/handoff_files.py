# SPDX-License-Identifier: Apache-2.0
"""The files and pipes that the handoff commands open for the daemon."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from cowshed.cache.errors import SourceError, UsageError

__all__ = ["Pump", "created", "created_new", "put_in_place", "reopened"]

_PUMP_BYTES = 1 << 18


def created(path: Path) -> IO[bytes]:
    """Open a file for writing, truncated, mode 0600. Raises UsageError."""
    return _opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)


def created_new(path: Path) -> IO[bytes]:
    """Open a file for writing and sync its directory. Raises UsageError if it is not empty."""
    file = _opened(path, os.O_WRONLY | os.O_CREAT)
    try:
        status = os.fstat(file.fileno())
        if stat.S_ISREG(status.st_mode) and status.st_size:
            raise UsageError(
                f"{str(path)!r} exists and has {status.st_size} bytes, perhaps of drained guests: "
                "name another file, or remove it"
            )
        _sync(path.absolute().parent)
    except BaseException:
        file.close()
        raise
    return file


def reopened(path: Path) -> IO[bytes]:
    """Open a file to read it and continue writing. Raises UsageError."""
    return _opened(path, os.O_RDWR)


def _opened(path: Path, flags: int) -> IO[bytes]:
    try:
        fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
        return open(fd, "r+b" if flags & os.O_RDWR else "wb", buffering=0)
    except OSError as error:
        raise UsageError(f"cannot write {str(path)!r}: {error.strerror}") from error


def put_in_place(part: Path, path: Path) -> None:
    """Rename a complete file to path and sync its directory. Raises SourceError."""
    try:
        os.replace(part, path)
        _sync(path.absolute().parent)
    except OSError as error:
        raise SourceError(
            f"cannot rename {str(part)!r} to {str(path)!r}: {error.strerror}; it is complete"
        ) from error


def _sync(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems' folders cannot be synced
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class Pump:
    """Carries bytes between the daemon and our stdin or stdout.

    The daemon gets a socket, on which it can wait with a deadline; on a pipe or terminal it blocks.
    """

    def __init__(self, fd: int, *, out: bool) -> None:
        """out: copy from the daemon to fd; else from fd to the daemon."""
        self._fd = fd
        self._out = out
        self._error: OSError | None = None
        self._ours, self._theirs = socket.socketpair()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @contextlib.contextmanager
    def running(self) -> Iterator[int]:
        """Yield the daemon's end while the bytes flow. Raises SourceError if fd fails."""
        self._thread.start()
        try:
            with self._theirs:
                yield self._theirs.fileno()
        except Exception as error:
            if self._error is None:
                raise
            raise self._failure() from error
        self._thread.join()
        if self._error is not None:
            raise self._failure()

    def _failure(self) -> SourceError:
        what = "write to stdout" if self._out else "read stdin"
        assert self._error is not None
        return SourceError(f"cannot {what}: {self._error.strerror}; every guest is as it was")

    def _run(self) -> None:
        with self._ours:
            try:
                self._pump()
            except OSError as error:
                self._error = error

    def _pump(self) -> None:
        if self._out:
            while raw := self._ours.recv(_PUMP_BYTES):
                left = memoryview(raw)
                while left:
                    left = left[os.write(self._fd, left) :]
        else:
            while raw := os.read(self._fd, _PUMP_BYTES):
                try:
                    self._ours.sendall(raw)
                except OSError:
                    return  # the daemon closed its end; its reply has the reason
