# SPDX-License-Identifier: Apache-2.0
"""A handoff as bytes: numbered frames with checksums, maybe compressed; for files and sockets.

    preamble   magic 8 "CSHDHAND", version u16, flags u16, crc u32 of the bytes before it
    frame      kind u16, flags u16, number u32, raw_bytes u32, stored_bytes u32,
               crc u32 of the header before it and of the payload; then the payload

Little-endian. Flag 1: the payload is one zstd frame with its content's size. Frames are numbered
from 0 without a gap. The last one of a file, END, has the SHA-256 of every byte before it.

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

import zstandard

from cowshed.cache.errors import SourceError

__all__ = [
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
    payload: bytes
    offset: int


@dataclass(frozen=True, slots=True)
class Mark:
    """A place between two frames, where another encoder can go on; sha256 is of all before it."""

    offset: int
    nr_frames: int
    sha256: hashlib._Hash


class FrameEncoder:
    """Encodes frames, in order. digest() covers all bytes encoded, and those before the mark."""

    def __init__(self, mark: Mark | None = None) -> None:
        """Start a handoff, or go on at mark, where the preamble is written already."""
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL)
        self._number = mark.nr_frames if mark else 0
        self._sha = mark.sha256.copy() if mark else hashlib.sha256()
        self.nr_bytes = mark.offset if mark else 0

    def preamble(self) -> bytes:
        """Return the bytes before the first frame."""
        start = _PREAMBLE.pack(MAGIC, VERSION, 0, 0)[:-4]
        return self._given(start + struct.pack("<I", zlib.crc32(start)))

    def frame(self, kind: FrameKind, payload: bytes) -> bytes:
        """Encode one frame; the payload must be at most MAX_RAW_BYTES."""
        assert len(payload) <= MAX_RAW_BYTES
        stored, flags = payload, 0
        if len(payload) >= 128:
            packed = self._compressor.compress(payload)
            if len(packed) < _WORTH * len(payload):
                stored, flags = packed, _COMPRESSED
        head = _HEADER.pack(kind, flags, self._number, len(payload), len(stored), 0)[:-4]
        self._number += 1
        crc = zlib.crc32(stored, zlib.crc32(head))
        return self._given(head + struct.pack("<I", crc) + stored)

    @property
    def nr_frames(self) -> int:
        """The number of frames encoded, with those before the mark."""
        return self._number

    def digest(self) -> str:
        """Return the SHA-256 of all bytes until now."""
        return self._sha.hexdigest()

    def _given(self, raw: bytes) -> bytes:
        self._sha.update(raw)
        self.nr_bytes += len(raw)
        return raw


class FrameDecoder:
    """Decodes frames from bytes as they come. Invariant: offset + len(_held) = bytes taken."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        self._began = False
        self._number = 0
        self._marked = 0
        self._section = "preamble"
        self._sha = hashlib.sha256()
        self.offset = 0

    def feed(self, raw: bytes | bytearray | memoryview) -> Iterator[Frame]:
        """Take received bytes; yield the frames they end. digest() is of the bytes before each."""
        self._held += raw
        if not self._began:
            if len(self._held) < _PREAMBLE.size:
                if not MAGIC.startswith(bytes(self._held[: len(MAGIC)])):
                    self.refuse("it does not begin with a handoff's magic")
                return
            self._take_preamble()
        while (frame := self._next()) is not None:
            taken = _HEADER.size + self._stored_bytes
            yield frame
            self._marked = self._number
            self._sha.update(memoryview(self._held)[:taken])
            del self._held[:taken]
            self.offset += taken
            self._section = frame.kind.name

    def digest(self) -> str:
        """Return the SHA-256 of all bytes before the frame yielded last."""
        return self._sha.hexdigest()

    def mark(self) -> Mark:
        """Return the place before the frame yielded last, or after it once feed() has returned."""
        return Mark(self.offset, self._marked, self._sha.copy())

    def end(self) -> Never:
        """Refuse an end of the bytes without END, with the offset at which to resume."""
        self.refuse(
            f"it is cut short after {len(self._held)} more bytes; everything before is good: "
            f"resume the transfer from byte {self.offset + len(self._held)}"
        )

    def check_empty(self) -> None:
        """Refuse bytes after the last frame."""
        if self._held:
            self.refuse(f"{len(self._held)} bytes are left over")

    def refuse(self, what: str) -> Never:
        """Raise DamagedError with the place of the damage."""
        raise DamagedError(
            f"at byte {self.offset}, frame {self._number}, after section {self._section}: {what}"
        )

    def _take_preamble(self) -> None:
        raw = bytes(self._held[: _PREAMBLE.size])
        magic, version, flags, crc = _PREAMBLE.unpack(raw)
        if magic != MAGIC:
            self.refuse("it does not begin with a handoff's magic")
        if crc != zlib.crc32(raw[:-4]):
            self.refuse("the preamble's checksum is wrong")
        if version != VERSION or flags:
            self.refuse(f"version {version}, flags {flags}; this end reads version {VERSION}, 0")
        self._sha.update(raw)
        del self._held[: _PREAMBLE.size]
        self.offset = _PREAMBLE.size
        self._began = True

    def _next(self) -> Frame | None:
        if len(self._held) < _HEADER.size:
            return None
        kind, flags, number, raw_bytes, stored_bytes, crc = _HEADER.unpack_from(self._held)
        if raw_bytes > MAX_RAW_BYTES or stored_bytes > raw_bytes or flags & ~_COMPRESSED:
            self.refuse(
                f"invalid frame header: {stored_bytes} bytes for {raw_bytes}, flags {flags}"
            )
        if len(self._held) < _HEADER.size + stored_bytes:
            return None
        view = memoryview(self._held)
        stored = bytes(view[_HEADER.size : _HEADER.size + stored_bytes])
        checked = zlib.crc32(stored, zlib.crc32(view[:_UNCHECKED]))
        view.release()
        if checked != crc:
            self.refuse("its checksum is wrong")
        if number != self._number:
            self.refuse(f"frame {number} comes instead of frame {self._number}")
        if kind not in FrameKind.__members__.values():
            self.refuse(f"unknown section kind {kind}")
        payload = self._unpack(stored, raw_bytes) if flags & _COMPRESSED else stored
        if len(payload) != raw_bytes:
            self.refuse(f"it has {len(payload)} bytes and its header says {raw_bytes}")
        frame = Frame(FrameKind(kind), number, payload, self.offset)
        self._number += 1
        self._stored_bytes = stored_bytes
        return frame

    def _unpack(self, stored: bytes, raw_bytes: int) -> bytes:
        # zstd allocates the size that a frame names, whatever limit it is given: check it first.
        try:
            if zstandard.frame_content_size(stored) != raw_bytes:
                self.refuse("its zstd frame and its header name different sizes")
            return self._decompressor.decompress(
                stored, max_output_size=raw_bytes, allow_extra_data=False
            )
        except zstandard.ZstdError as error:
            self.refuse(f"it cannot be decompressed ({error})")
