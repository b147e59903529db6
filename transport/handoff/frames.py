# SPDX-License-Identifier: Apache-2.0
"""A handoff as bytes: numbered frames with checksums, maybe compressed; for files and sockets.

    preamble   magic 8 "CSHDHAND", version u16, flags u16, crc u32 of the bytes before it
    frame      kind u16, flags u16, number u32, raw_bytes u32, stored_bytes u32,
               crc u32 of the header before it and of the payload; then the payload

Little-endian. Flag 1: the payload is one zstd frame with its content's size. Flag 2, only between
two backends that know it: the XXH3-128 of the stored payload follows the header, 16 bytes in
canonical (big-endian) order; the crc is then of the header and these. Frames are numbered from 0
without a gap. The last one of a file, END, has the SHA-256 of every byte before it, except the
payloads of frames with flag 2, whose digests it covers.

Sans-IO: bytes in, frames out. Received bytes are untrusted; every violation is a DamagedError with
its place, after which the decoder must not be used. Memory is bounded by one frame, and grows with
what has arrived, not with what was announced.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Never

import xxhash
import zstandard

from cowshed.cache.errors import SourceError

__all__ = [
    "HEAD_BYTES",
    "MAX_RAW_BYTES",
    "DamagedError",
    "Frame",
    "FrameDecoder",
    "FrameEncoder",
    "FrameKind",
    "Mark",
]

MAGIC: Final = b"CSHDHAND"
VERSION: Final = 1
MAX_RAW_BYTES: Final = 4 << 20
_PREAMBLE: Final = struct.Struct("<8sHHI")
_HEADER: Final = struct.Struct("<HHIIII")
_UNCHECKED: Final = _HEADER.size - 4
_COMPRESSED: Final = 1
_XXH128: Final = 2
_FLAGS: Final = _COMPRESSED | _XXH128
# What precedes a payload at most: the header, and with flag 2 the payload's digest.
HEAD_BYTES: Final = _HEADER.size + 16
# Smaller payloads are neither compressed nor have a digest of their own.
_LEAST_BYTES: Final = 128
_FIRST_BYTES: Final = 64 << 10
_MAX_SPARE: Final = 3
_LEVEL: Final = 1
# Store a frame uncompressed unless compression shrinks it below this part.
_WORTH: Final = 0.9
_MAX_WINDOW_BYTES: Final = 8 << 20


class DamagedError(SourceError):
    """The bytes are damaged, or not a handoff; the text names the place."""


class FrameKind(IntEnum):
    """The kind of a frame's section; see sections.py."""

    HEADER = 1
    IMAGE = 2
    GUEST = 3
    WORKING_SET = 4
    PAGES = 5
    DROPPED = 6
    TOTALS = 7
    END = 8
    MESSAGE = 9  # a control message; never in a file
    MISSING = 10  # of post-copy; never in a file
    IMAGE_BYTES = 16
    IMAGE_WHOLE = 17


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame's content, uncompressed, and where its header began."""

    kind: FrameKind
    number: int
    payload: bytes | memoryview
    offset: int


@dataclass(frozen=True, slots=True)
class Mark:
    """A place between two frames, where another encoder can go on; sha256 is of all before it."""

    offset: int
    nr_frames: int
    sha256: hashlib._Hash


class FrameEncoder:
    """Encodes frames, in order. digest() covers all bytes encoded, and those before the mark.

    compresses: whether to compress payloads that shrink enough. checks_by_xxh128: the peer knows
    flag 2. Both may change between frames.
    """

    def __init__(self, mark: Mark | None = None) -> None:
        """Start a handoff, or go on at mark, where the preamble is written already."""
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL)
        self._number = mark.nr_frames if mark else 0
        self._sha = mark.sha256.copy() if mark else hashlib.sha256()
        self.nr_bytes = mark.offset if mark else 0
        self.compresses = True
        self.checks_by_xxh128 = False

    def preamble(self) -> bytes:
        """Return the bytes before the first frame."""
        start = _PREAMBLE.pack(MAGIC, VERSION, 0, 0)[:-4]
        whole = start + struct.pack("<I", zlib.crc32(start))
        self._sha.update(whole)
        self.nr_bytes += len(whole)
        return whole

    def frame(self, kind: FrameKind, payload: bytes) -> bytes:
        """Encode one frame; the payload must be at most MAX_RAW_BYTES."""
        room = bytearray(HEAD_BYTES + len(payload))
        room[HEAD_BYTES:] = payload
        return bytes(self.seal(kind, memoryview(room)))

    def seal(self, kind: FrameKind, room: memoryview) -> bytes | memoryview:
        """Encode one frame whose payload is in room, after HEAD_BYTES for what precedes it.

        Returns a part of room, unless the payload was compressed: so it is not copied.
        """
        payload = room[HEAD_BYTES:]
        raw_bytes = len(payload)
        assert raw_bytes <= MAX_RAW_BYTES
        packed, flags = None, 0
        if self.compresses and raw_bytes >= _LEAST_BYTES:
            packed = self._compressor.compress(payload)
            if len(packed) < _WORTH * raw_bytes:
                payload, flags = memoryview(packed), _COMPRESSED
        digest = b""
        if self.checks_by_xxh128 and raw_bytes >= _LEAST_BYTES:
            flags |= _XXH128
            digest = xxhash.xxh3_128_digest(payload)
        head = _HEADER.pack(kind, flags, self._number, raw_bytes, len(payload), 0)[:-4]
        crc = zlib.crc32(digest or payload, zlib.crc32(head))
        head += struct.pack("<I", crc) + digest
        self._number += 1
        self._sha.update(head)
        if not digest:
            self._sha.update(payload)
        self.nr_bytes += len(head) + len(payload)
        if flags & _COMPRESSED:
            return head + payload
        start = HEAD_BYTES - len(head)
        room[start:HEAD_BYTES] = head
        return room[start:]

    @property
    def nr_frames(self) -> int:
        """The number of frames encoded, with those before the mark."""
        return self._number

    def digest(self) -> str:
        """Return the SHA-256 of all bytes until now, without payloads that xxh128 covers."""
        return self._sha.hexdigest()


class FrameDecoder:
    """Decodes frames from bytes as they come: into room(), then advance(); or feed().

    No bytes past the frame's end are asked for, so each frame has a buffer of its own, of which its
    payload is a part. Invariant: offset + _nr_held = bytes taken; _room has the frame's first
    _nr_held bytes.
    """

    def __init__(self) -> None:
        self._room = bytearray(_FIRST_BYTES)
        self._nr_held = 0
        self._most_bytes = _FIRST_BYTES  # of a frame that has arrived
        self._spare: list[bytearray] = []
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        self._began = False
        self._number = 0
        self._marked = 0
        self._section = "preamble"
        self._sha = hashlib.sha256()
        self.offset = 0

    def feed(self, raw: bytes | bytearray | memoryview) -> Iterator[Frame]:
        """Take received bytes; yield the frames they end. digest() is of the bytes before each."""
        left = memoryview(raw)
        while left:
            room = self.room()
            nr = min(len(room), len(left))
            room[:nr] = left[:nr]
            room.release()
            left = left[nr:]
            yield from self.advance(nr)

    def room(self) -> memoryview:
        """Return where to put the next bytes; never empty, and never past the end of a frame."""
        need = self._need()
        if need > len(self._room):
            # Not more than twice of what has arrived, or of what the largest frame had.
            size = min(need, max(2 * self._nr_held, self._most_bytes))
            if size > len(self._room):
                larger = self._take_spare(size)
                larger[: self._nr_held] = memoryview(self._room)[: self._nr_held]
                self._room = larger
        return memoryview(self._room)[self._nr_held : min(need, len(self._room))]

    def advance(self, nr_bytes: int) -> Iterator[Frame]:
        """Take bytes that were put into room(); yield the frame that they end, if they do.

        digest() is of the bytes before the frame until it has been taken. The payload is valid as
        long as it is referred to.
        """
        self._nr_held += nr_bytes
        if not self._began:
            held = bytes(memoryview(self._room)[: self._nr_held])
            if not MAGIC.startswith(held[: len(MAGIC)]):
                self.refuse("it does not begin with a handoff's magic")
            if self._nr_held == _PREAMBLE.size:
                self._take_preamble(held)
            return
        if self._nr_held < _HEADER.size or self._nr_held < self._need():
            return
        frame, head_bytes = self._decode()
        yield frame
        whole = memoryview(self._room)[: self._nr_held]
        self._sha.update(whole if head_bytes == _HEADER.size else whole[:head_bytes])
        self._marked = self._number
        self._section = frame.kind.name
        self._pass_over()

    def digest(self) -> str:
        """Return the SHA-256 of all bytes before the frame yielded last."""
        return self._sha.hexdigest()

    def mark(self) -> Mark:
        """Return the place before the frame yielded last, or after it once feed() has returned."""
        return Mark(self.offset, self._marked, self._sha.copy())

    def end(self) -> Never:
        """Refuse an end of the bytes without END, with the offset at which to resume."""
        self.refuse(
            f"it is cut short after {self._nr_held} more bytes; everything before is good: "
            f"resume the transfer from byte {self.offset + self._nr_held}"
        )

    def check_empty(self) -> None:
        """Refuse bytes after the last frame."""
        if self._nr_held:
            self.refuse(f"{self._nr_held} bytes are left over")

    def refuse(self, what: str) -> Never:
        """Raise DamagedError with the place of the damage."""
        raise DamagedError(
            f"at byte {self.offset}, frame {self._number}, after section {self._section}: {what}"
        )

    def _need(self) -> int:
        """Return how many bytes the preamble or the frame has, as far as it is known."""
        if not self._began:
            return _PREAMBLE.size
        if self._nr_held < _HEADER.size:
            return _HEADER.size
        _, flags, _, raw_bytes, stored_bytes, _ = _HEADER.unpack_from(self._room)
        if raw_bytes > MAX_RAW_BYTES or stored_bytes > raw_bytes or flags & ~_FLAGS:
            self.refuse(
                f"invalid frame header: {stored_bytes} bytes for {raw_bytes}, flags {flags}"
            )
        return _head_bytes(flags) + int(stored_bytes)

    def _take_preamble(self, raw: bytes) -> None:
        magic, version, flags, crc = _PREAMBLE.unpack(raw)
        if magic != MAGIC:
            self.refuse("it does not begin with a handoff's magic")
        if crc != zlib.crc32(raw[:-4]):
            self.refuse("the preamble's checksum is wrong")
        if version != VERSION or flags:
            self.refuse(f"version {version}, flags {flags}; this end reads version {VERSION}, 0")
        self._sha.update(raw)
        self._began = True
        self._pass_over()

    def _pass_over(self) -> None:
        """Begin the next frame, in a buffer that nobody else refers to."""
        self.offset += self._nr_held
        self._most_bytes = max(self._most_bytes, self._nr_held)
        self._nr_held = 0
        self._spare = [self._room, *self._spare][:_MAX_SPARE]
        self._room = self._take_spare(_FIRST_BYTES)

    def _take_spare(self, size: int) -> bytearray:
        for no, spare in enumerate(self._spare):
            if len(spare) >= size and _is_free(spare):
                return self._spare.pop(no)
        return bytearray(size)

    def _decode(self) -> tuple[Frame, int]:
        """Check the whole frame in _room; return it, and the size of what precedes its payload."""
        kind, flags, number, raw_bytes, stored_bytes, crc = _HEADER.unpack_from(self._room)
        head_bytes = _head_bytes(flags)
        whole = memoryview(self._room)
        stored = whole[head_bytes : head_bytes + stored_bytes]
        digest = whole[_HEADER.size : head_bytes]
        if zlib.crc32(digest or stored, zlib.crc32(whole[:_UNCHECKED])) != crc:
            self.refuse("its checksum is wrong")
        if digest and xxhash.xxh3_128_digest(stored) != digest:
            self.refuse("its xxh128 is wrong")
        if number != self._number:
            self.refuse(f"frame {number} comes instead of frame {self._number}")
        if kind not in FrameKind.__members__.values():
            self.refuse(f"unknown section kind {kind}")
        payload = self._unpack(stored, raw_bytes) if flags & _COMPRESSED else stored
        if len(payload) != raw_bytes:
            self.refuse(f"it has {len(payload)} bytes and its header says {raw_bytes}")
        self._number += 1
        return Frame(FrameKind(kind), number, payload, self.offset), head_bytes

    def _unpack(self, stored: memoryview, raw_bytes: int) -> bytes:
        # zstd allocates the size that a frame names, whatever limit it is given: check it first.
        try:
            if zstandard.frame_content_size(stored) != raw_bytes:
                self.refuse("its zstd frame and its header name different sizes")
            return self._decompressor.decompress(
                stored, max_output_size=raw_bytes, allow_extra_data=False
            )
        except zstandard.ZstdError as error:
            self.refuse(f"it cannot be decompressed ({error})")


def _head_bytes(flags: int) -> int:
    return HEAD_BYTES if flags & _XXH128 else _HEADER.size


def _is_free(buffer: bytearray) -> bool:
    """Whether nobody refers to a part of it; only such a buffer may change its size."""
    try:
        buffer.append(0)
    except BufferError:
        return False
    del buffer[-1]
    return True
