# SPDX-License-Identifier: Apache-2.0
"""Encode messages as packets and decode them, without a socket.

A message is one JSON object. It travels in packets of at most 64 KiB, each a little-endian header
and a piece of the object's UTF-8 text:

    magic u32, version u16, flags u16, tag u32,
    nr_fds u16, reserved u16, total_length u32, piece_length u32

A message that does not fit continues in the next packets: flag MORE is set in all but the last, all
but the last are full, and no other packet comes between. Each repeats tag and total_length.
Descriptors travel with the first packet. A reply carries its request's tag. fields.py reads the
fields of a message.

Received bytes are untrusted: every violation is a PeerError, after which the decoder must not be
used. Memory is bounded by the limit given, and grows with what has arrived, not with what was
announced.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Never

from cowshed.cache.errors import PeerError, UsageError

MAGIC: Final = 0x44485343
VERSION: Final = 1
FLAG_MORE: Final = 1
HEADER: Final = struct.Struct("<IHHIHHII")
MAX_PACKET_BYTES: Final = 64 << 10
MAX_PIECE_BYTES: Final = MAX_PACKET_BYTES - HEADER.size
MAX_REQUEST_BYTES: Final = 64 << 10
MAX_REPLY_BYTES: Final = 16 << 20
MAX_FDS: Final = 8
MAX_DEPTH: Final = 16
MAX_TAG: Final = (1 << 32) - 1

Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One whole received message; nr_fds descriptors came with it."""

    tag: int
    body: Body
    nr_fds: int


def encode(
    tag: int, body: Mapping[str, Any], nr_fds: int = 0, limit_bytes: int = MAX_REPLY_BYTES
) -> list[bytes]:
    """Return the packets of one message, to be sent in order; nr_fds descriptors go with the first.

    Raises UsageError if the body is not JSON or longer than limit_bytes, or a number out of range.
    """
    if not 0 <= tag <= MAX_TAG:
        raise UsageError(f"message tag {tag} is not a 32-bit number")
    if not 0 <= nr_fds <= MAX_FDS:
        raise UsageError(f"a message carries at most {MAX_FDS} descriptors, not {nr_fds}")
    try:
        text = json.dumps(body, separators=(",", ":"), allow_nan=False).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"message cannot be written as JSON: {error}") from error
    if len(text) > limit_bytes:
        raise UsageError(
            f"message of {len(text)} bytes is over the limit of {limit_bytes}; ask for less at once"
        )
    packets = []
    for start in range(0, len(text), MAX_PIECE_BYTES):
        piece = text[start : start + MAX_PIECE_BYTES]
        flags = FLAG_MORE if start + len(piece) < len(text) else 0
        packets.append(
            HEADER.pack(MAGIC, VERSION, flags, tag, nr_fds, 0, len(text), len(piece)) + piece
        )
        nr_fds = 0
    return packets


class Decoder:
    """Reassembles packets; buffers at most one unfinished message of at most limit_bytes.

    Invariants: (1) _pieces is empty between messages; (2) within one, len(_pieces) < _total_length
    and is a multiple of MAX_PIECE_BYTES; (3) _total_length <= limit_bytes.
    """

    def __init__(self, limit_bytes: int = MAX_REPLY_BYTES) -> None:
        self.limit_bytes: Final = limit_bytes
        self._pieces = bytearray()
        self._tag = 0
        self._nr_fds = 0
        self._total_length = 0

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold."""
        assert not self._pieces or len(self._pieces) < self._total_length
        assert len(self._pieces) % MAX_PIECE_BYTES == 0
        assert self._total_length <= self.limit_bytes

    @property
    def unfinished(self) -> bool:
        """Whether a message has begun and not ended."""
        return bool(self._pieces)

    def feed(self, packet: bytes | bytearray | memoryview, nr_fds: int = 0) -> list[Message]:
        """Take a packet and the number of its descriptors; return the 0 or 1 messages it ends.

        Raises PeerError for every violation.
        """
        if not HEADER.size <= len(packet) <= MAX_PACKET_BYTES:
            _refuse(
                f"packet of {len(packet)} bytes; {HEADER.size} to {MAX_PACKET_BYTES} are allowed"
            )
        magic, version, flags, tag, fds_told, reserved, total_length, piece_length = (
            HEADER.unpack_from(packet)
        )
        if magic != MAGIC:
            _refuse(f"packet begins with {magic:#010x}, not {MAGIC:#010x}: not a cowshed peer")
        if version != VERSION:
            _refuse(f"protocol version {version}; this end speaks {VERSION}")
        if flags & ~FLAG_MORE or reserved:
            _refuse(f"unknown flags {flags:#x} or reserved {reserved:#x} in a packet header")
        if fds_told != nr_fds or nr_fds > MAX_FDS:
            _refuse(
                f"packet announces {fds_told} descriptors and carries {nr_fds}; at most {MAX_FDS}"
            )
        if piece_length != len(packet) - HEADER.size:
            _refuse(f"piece of {piece_length} bytes in a packet of {len(packet)}")
        if not self._pieces:
            if not 0 < total_length <= self.limit_bytes:
                _refuse(f"message of {total_length} bytes; 1 to {self.limit_bytes} are allowed")
            self._tag, self._nr_fds, self._total_length = tag, nr_fds, total_length
        elif (tag, total_length, nr_fds) != (self._tag, self._total_length, 0):
            _refuse(f"message {self._tag} was broken off by a packet of message {tag}")
        length = len(self._pieces) + piece_length
        more = bool(flags & FLAG_MORE)
        if more != (length < self._total_length) or length > self._total_length:
            _refuse(f"message of {self._total_length} bytes has {length} and MORE is {more}")
        if more and piece_length != MAX_PIECE_BYTES:
            _refuse(f"piece of {piece_length} bytes with MORE set; it must fill its packet")
        self._pieces += memoryview(packet)[HEADER.size :]
        if more:
            return []
        body = parse_body(self._pieces)
        self._pieces = bytearray()
        return [Message(self._tag, body, self._nr_fds)]


def parse_body(text: bytes | bytearray) -> Body:
    """Parse a JSON object; PeerError if nested too deep, or for NaN, infinity or repeated keys."""
    try:
        body = json.loads(
            text.decode("utf-8"),
            parse_float=_finite,
            parse_constant=_refuse_constant,
            object_pairs_hook=_once,
        )
    except RecursionError as error:
        raise PeerError(f"message nests deeper than {MAX_DEPTH}") from error
    except ValueError as error:
        raise PeerError(f"message is not JSON: {error}") from error
    if not isinstance(body, dict):
        _refuse(f"message is a JSON {type(body).__name__}, not an object")
    # The number of brackets bounds the depth and is cheap to count: few messages are walked.
    if text.count(b"{") + text.count(b"[") > MAX_DEPTH:
        _check_depth(body)
    return body


def _check_depth(body: Body) -> None:
    level: list[Any] = [body]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            inner.extend(
                item
                for item in (value.values() if isinstance(value, dict) else value)
                if isinstance(item, (dict, list))
            )
        if not inner:
            return
        level = inner
    _refuse(f"message nests deeper than {MAX_DEPTH}")


def _once(pairs: list[tuple[str, Any]]) -> Body:
    body = dict(pairs)
    if len(body) != len(pairs):
        raise ValueError("an object has the same key twice")
    return body


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError("a number is out of range")
    return value


def _refuse_constant(name: str) -> Never:
    raise ValueError(f"{name} is not JSON")


def _refuse(what: str) -> Never:
    raise PeerError(what)
