# SPDX-License-Identifier: Apache-2.0
"""Where an image's bytes come from: so far, a file or block device on this host."""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cowshed.cache.errors import SourceError

__all__ = ["FileSource"]

_MAX_BYTES = 1 << 48


@dataclass(frozen=True)
class FileSource:
    """A file or block device, open for reading and known to be usable.

    Owns its descriptors until an image takes them over. direct_fd is the same file opened O_DIRECT,
    or -1 where its file system has no such thing.
    """

    path: Path
    size_bytes: int
    fd: int
    direct_fd: int
    _mtime_ns: int

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open path; SourceError, in one line, if it cannot be an image."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise SourceError(
                f"cannot open image source {str(path)!r}: {error.strerror}; "
                "name a file that the backend can read"
            ) from error
        try:
            status = os.fstat(fd)
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
                raise SourceError(
                    f"image source {str(path)!r} is neither a file nor a block device; "
                    "name a raw image"
                )
            size_bytes = os.lseek(fd, 0, os.SEEK_END)
            if not 0 < size_bytes < _MAX_BYTES:
                raise SourceError(
                    f"image source {str(path)!r} has {size_bytes} bytes; "
                    "an image has at least 1 and less than 256 TiB"
                )
            os.set_blocking(fd, True)
        except BaseException:
            os.close(fd)
            raise
        direct_fd = -1
        with contextlib.suppress(OSError):
            direct_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            if not os.path.samestat(os.fstat(direct_fd), status):
                os.close(direct_fd)  # replaced between the two opens
                direct_fd = -1
        return cls(path, size_bytes, fd, direct_fd, status.st_mtime_ns)

    def reopen(self) -> int:
        """Give a new descriptor of the file, for reading, that shares no state with ours.

        Raises SourceError if it cannot be had.
        """
        try:
            return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SourceError(
                f"cannot open image source {str(self.path)!r} again: {error.strerror}; "
                "name a file that the backend can read"
            ) from error

    def changed(self) -> str | None:
        """Say how the open file differs from when it was opened, or None if it does not."""
        status = os.fstat(self.fd)
        if stat.S_ISREG(status.st_mode):
            if status.st_size != self.size_bytes:
                return f"size was {self.size_bytes} bytes and is {status.st_size}"
            if status.st_mtime_ns != self._mtime_ns:
                return "it was written to"
        return None

    def close(self) -> None:
        """Close the descriptors of a source that nobody took over."""
        os.close(self.fd)
        if self.direct_fd >= 0:
            os.close(self.direct_fd)
