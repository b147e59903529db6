# SPDX-License-Identifier: Apache-2.0
"""Working sets: which extents of an image guests touch, in the order of first touch; a file each.

Replayed as prefetch at the next start. A file is a hint about one image: if it is damaged, or is of
another image or extent size, it is refused whole. Format, little-endian:

    magic           8 bytes  "CSHDWSET"
    version         u32      1
    extent_bytes    u32
    nr_image_extents u64     extents of the whole image
    nr_listed       u32      extents in the list
    digest_bytes    u32      length of the digest
    digest          UTF-8    the image's, as status shows it
    list            u32 each extent numbers, first touched first, no duplicates
    crc             u32      CRC-32 of everything before it

Binary, with a CRC: a list of a million extents is 4 MB and is read in milliseconds. u32 numbers
reach 256 TiB in 64 KiB extents.
"""

import os
import stat
import struct
import sys
import tempfile
import zlib
from array import array
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cowshed.cache.errors import SourceError, UsageError

_MAGIC = b"CSHDWSET"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQII")
_CRC = struct.Struct("<I")
_EXTENT_NO_BYTES = 4
_MAX_DIGEST_BYTES = 1024
_PAGE_BYTES = 4096

MAX_FILE_BYTES = 64 << 20
"""A larger file is refused unread: 16 million extents, a terabyte of 64 KiB extents."""


@dataclass(frozen=True, slots=True)
class WorkingSet:
    """The extents of one image in the order of first touch; valid by construction.

    Raises UsageError for a digest, a size or a number that no image can have.
    """

    digest: str
    extent_bytes: int
    nr_image_extents: int
    extents: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse what could not be written or replayed; O(len(extents))."""
        size = self.extent_bytes
        if not 0 < len(self.digest.encode()) <= _MAX_DIGEST_BYTES:
            raise UsageError(
                f"digest {self.digest[:40]!r} is empty or too long: give the image's digest"
            )
        if not _PAGE_BYTES <= size < 1 << 32 or size & (size - 1):
            raise UsageError(f"extents of {size} bytes: give a power of two from {_PAGE_BYTES} up")
        if not 0 <= self.nr_image_extents <= 1 << 32:
            raise UsageError(f"an image of {self.nr_image_extents} extents: give 0 to {1 << 32}")
        if self.extents and not (
            min(self.extents) >= 0 and max(self.extents) < self.nr_image_extents
        ):
            raise UsageError(
                f"an extent lies outside the image's {self.nr_image_extents} extents: leave it out"
            )
        if len(set(self.extents)) != len(self.extents):
            raise UsageError("an extent is listed twice: list each at its first touch")


class FirstTouches:
    """Records the order of first touch, each extent once; memory grows with distinct extents."""

    def __init__(self) -> None:
        """Start with nothing touched."""
        self._extents: dict[int, None] = {}

    def __len__(self) -> int:
        """Count the distinct extents touched."""
        return len(self._extents)

    def note(self, extents: Iterable[int]) -> None:
        """Add extents, in the order touched; those already noted keep their place."""
        self._extents.update(dict.fromkeys(extents))

    def working_set(self, *, digest: str, extent_bytes: int, nr_image_extents: int) -> WorkingSet:
        """Make the record a WorkingSet of that image. Raises UsageError as WorkingSet does."""
        return WorkingSet(digest, extent_bytes, nr_image_extents, tuple(self._extents))


def encode_working_set(working_set: WorkingSet) -> bytes:
    """Give the file's bytes. Raises UsageError if there would be more than MAX_FILE_BYTES."""
    digest = working_set.digest.encode()
    extents = working_set.extents
    header = _HEADER.pack(
        _MAGIC,
        _VERSION,
        working_set.extent_bytes,
        working_set.nr_image_extents,
        len(extents),
        len(digest),
    )
    body = header + digest + _little_endian(array("I", extents)).tobytes()
    if len(body) + _CRC.size > MAX_FILE_BYTES:
        raise UsageError(
            f"a working set of {len(extents)} extents is too long for a file: use larger extents"
        )
    return body + _CRC.pack(zlib.crc32(body))


def decode_working_set(content: bytes) -> WorkingSet:
    """Read the file's bytes back, whole or not at all. Raises UsageError naming what is wrong."""
    if not content.startswith(_MAGIC):
        raise UsageError("not a working-set file: name the right one")
    if len(content) < _HEADER.size + _CRC.size:
        raise UsageError(f"working set cut short at {len(content)} bytes: delete it to record anew")
    _, version, extent_bytes, nr_image_extents, nr_listed, digest_bytes = _HEADER.unpack_from(
        content
    )
    if version != _VERSION:
        raise UsageError(
            f"working set of version {version}, not {_VERSION}: delete it to record anew"
        )
    list_offset = _HEADER.size + digest_bytes
    end_offset = list_offset + nr_listed * _EXTENT_NO_BYTES
    if len(content) != end_offset + _CRC.size:
        raise UsageError(
            f"working set of {len(content)} bytes, not {end_offset + _CRC.size}: "
            "delete it to record anew"
        )
    if _CRC.unpack_from(content, end_offset)[0] != zlib.crc32(content[:end_offset]):
        raise UsageError("working set damaged (its CRC is wrong): delete it to record anew")
    extents = array("I", content[list_offset:end_offset])
    try:
        digest = content[_HEADER.size : list_offset].decode()
    except UnicodeDecodeError as error:
        raise UsageError("working set's digest is not UTF-8: delete it to record anew") from error
    return WorkingSet(digest, extent_bytes, nr_image_extents, tuple(_little_endian(extents)))


def write_working_set(path: Path, working_set: WorkingSet) -> None:
    """Put the working set at path, replacing what was there; readers see the old or the new, whole.

    Survives a power cut once it has returned. Raises SourceError if a file operation fails: path
    then holds the old one, or, if only the last step failed, the new one. Raises UsageError as
    encode_working_set does, before anything is done.
    """
    content = encode_working_set(working_set)
    try:
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with open(fd, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(name)
            raise
        _sync_directory(path.parent)
    except OSError as error:
        raise SourceError(
            f"writing working set {path}: {error.strerror}: free space or allow writes there"
        ) from error


def read_working_set(
    path: Path, *, digest: str, extent_bytes: int, nr_image_extents: int
) -> WorkingSet | None:
    """Read the working set of just that image; None if there is no file.

    Raises SourceError if the file cannot be read, and UsageError if it is not a working set,
    damaged, or of another image or extent size. All or nothing.
    """
    try:
        content = _read_regular(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SourceError(
            f"reading working set {path}: {error.strerror}: make it readable"
        ) from error
    try:
        working_set = decode_working_set(content)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    for what, recorded, wanted in (
        ("digest", working_set.digest, digest),
        ("extent size", working_set.extent_bytes, extent_bytes),
        ("number of extents", working_set.nr_image_extents, nr_image_extents),
    ):
        if recorded != wanted:
            raise UsageError(
                f"{path}: recorded for another image ({what} {recorded}, not {wanted}): "
                "delete it to record anew"
            )
    return working_set


def _read_regular(path: Path) -> bytes:
    """Read a regular file of bounded size; O_NONBLOCK, since a FIFO would wait for a writer."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{path}: not a regular file: name a working-set file")
        if status.st_size > MAX_FILE_BYTES:
            raise UsageError(
                f"{path}: {status.st_size} bytes are too many for a working set: delete it"
            )
        return file.read(MAX_FILE_BYTES + 1)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _little_endian(numbers: "array[int]") -> "array[int]":
    """Turn native numbers into little-endian ones or back, in place."""
    assert numbers.itemsize == _EXTENT_NO_BYTES
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers
