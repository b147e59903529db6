# SPDX-License-Identifier: Apache-2.0
"""Where an image's bytes come from: so far, a file or block device on this host."""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from cowshed.cache.errors import SourceError

__all__ = ["FileSource", "SourceAtPath", "SourceIdentity"]

_MAX_BYTES = 1 << 48

SourceAtPath = Literal["same", "other", "gone"]


@dataclass(frozen=True)
class SourceIdentity:
    """Identifies a source, as it was when it was opened.

    device is the number of the block device, or of the file's file system. mtime_ns is 0 for a
    block device, whose times do not depend on its bytes.
    """

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result, size_bytes: int) -> Self:
        """Give the identity of a file or block device with that status."""
        if stat.S_ISBLK(status.st_mode):
            return cls(status.st_rdev, status.st_ino, size_bytes, 0)
        return cls(status.st_dev, status.st_ino, size_bytes, status.st_mtime_ns)

    def is_same_file(self, other: SourceIdentity) -> bool:
        """Whether both identify one file or device, even if its bytes changed."""
        return (self.device, self.inode) == (other.device, other.inode)


@dataclass(frozen=True)
class FileSource:
    """A file or block device, open for reading and known to be usable.

    Owns its descriptors until an image takes them over. direct_fd is the same file opened O_DIRECT,
    or -1 if its file system has no O_DIRECT. path is where the file was when it was opened: another
    file may be there by now.
    """

    path: Path
    identity: SourceIdentity
    fd: int
    direct_fd: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the source when it was opened: the image's size."""
        return self.identity.size_bytes

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
            # Each close of a descriptor, at exit too, sends a flush to a FUSE server, until the
            # server answers ENOSYS once. Get that answer now: a server that hangs later would delay
            # our exit.
            os.close(os.dup(fd))
        except BaseException:
            os.close(fd)
            raise
        direct_fd = -1
        with contextlib.suppress(OSError):
            direct_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            if not os.path.samestat(os.fstat(direct_fd), status):
                os.close(direct_fd)  # replaced between the two opens
                direct_fd = -1
        return cls(path, SourceIdentity.of(status, size_bytes), fd, direct_fd)

    @property
    def mtime_ns(self) -> int:
        """When it was last written to, as of its opening; of a block device, its node's time."""
        return self.identity.mtime_ns or os.fstat(self.fd).st_mtime_ns  # a node is in memory

    def reopen(self) -> int:
        """Return a new descriptor of the file, for reading, that shares no state with ours.

        Raises SourceError if the file cannot be opened.
        """
        try:
            return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SourceError(
                f"cannot open image source {str(self.path)!r} again: {error.strerror}; "
                "name a file that the backend can read"
            ) from error

    def changed(self) -> str | None:
        """Return how the open file's size changed since it was opened, or None.

        Its times prove nothing: see written_ns(). May wait for as long as the file system does.
        """
        status = os.fstat(self.fd)
        if stat.S_ISREG(status.st_mode) and status.st_size != self.size_bytes:
            return f"size was {self.size_bytes} bytes and is {status.st_size}"
        return None

    def written_ns(self) -> int:
        """Return the file's modification time; 0 for a block device, which has none.

        A time other than identity.mtime_ns only calls for a look at the bytes: a backup or `touch`
        sets times, too. May wait for as long as the file system does.
        """
        status = os.fstat(self.fd)
        return status.st_mtime_ns if stat.S_ISREG(status.st_mode) else 0

    def at_path(self) -> SourceAtPath:
        """Return what the path names now: this file, another one, or none.

        May wait for as long as the file system does.
        """
        try:
            status = os.stat(self.path)
        except OSError:
            return "gone"
        there = SourceIdentity.of(status, status.st_size)
        return "same" if self.identity.is_same_file(there) else "other"

    def close(self) -> None:
        """Close the descriptors of a source that no image took over."""
        os.close(self.fd)
        if self.direct_fd >= 0:
            os.close(self.direct_fd)
