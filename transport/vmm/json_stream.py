# SPDX-License-Identifier: Apache-2.0
"""Cut a byte stream into JSON texts, without a socket: pieces in, whole arrays and objects out.

Some peers send one JSON value after another over a stream, without lengths. A value ends where its
brackets close, so the cutter follows brackets and strings, and leaves the rest of the grammar to
the parser. It keeps its place between pieces: each byte is scanned once, however small they are.
"""

from __future__ import annotations

import re
from typing import Final

from cowshed.cache.errors import PeerError

__all__ = ["MAX_TEXT_BYTES", "JsonStream"]

MAX_TEXT_BYTES: Final = 64 << 10
MAX_DEPTH: Final = 16

_BETWEEN: Final = re.compile(rb"[ \t\r\n]*")
_OUTSIDE_STRING: Final = re.compile(rb'["{}\[\]]')
_INSIDE_STRING: Final = re.compile(rb'["\\]')


class JsonStream:
    """Buffers at most one unfinished text of at most limit_bytes.

    Invariants: (1) between texts _text is empty, _depth 0 and _in_string false;
    (2) len(_text) <= limit_bytes. After a PeerError it must not be used.
    """

    def __init__(self, limit_bytes: int = MAX_TEXT_BYTES) -> None:
        self.limit_bytes: Final = limit_bytes
        self._text = bytearray()
        self._at = 0  # the bytes before are scanned
        self._depth = 0
        self._in_string = False

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold."""
        assert self._text or not (self._depth or self._in_string)
        assert len(self._text) <= self.limit_bytes

    @property
    def unfinished(self) -> bool:
        """Whether a text has begun and not ended."""
        return bool(self._text)

    def feed(self, piece: bytes) -> list[bytes]:
        """Take a piece of the stream; return the texts it ends, in order; O(len(piece) * texts).

        Raises PeerError for a text too long or too deep, and for other bytes between texts.
        """
        texts = []
        while piece:
            if not self._text:
                piece = piece[_end(_BETWEEN, piece) :]
                if not piece:
                    break
                if piece[:1] not in (b"{", b"["):
                    raise PeerError(
                        f"a message begins with byte {piece[0]:#04x}; "
                        "needed: a JSON array or object"
                    )
            room = self.limit_bytes - len(self._text)
            begun = len(self._text)
            self._text += piece[:room]
            end = self._find_end()
            if end is None:
                if len(piece) > room:
                    raise PeerError(f"a message is longer than {self.limit_bytes} bytes")
                break
            texts.append(bytes(self._text[:end]))
            piece = piece[end - begun :]
            self._text.clear()
            self._at = 0
        return texts

    def _find_end(self) -> int | None:
        """Scan on for the end of the text; return it, or None if it has not arrived."""
        while True:
            pattern = _INSIDE_STRING if self._in_string else _OUTSIDE_STRING
            found = pattern.search(self._text, self._at)
            if found is None:
                # If the last byte was a backslash, _at is one past the end.
                self._at = max(self._at, len(self._text))
                return None
            self._at = found.end()
            byte = found.group()
            if byte == b"\\":
                self._at += 1
            elif byte == b'"':
                self._in_string = not self._in_string
            elif byte in b"{[":
                self._depth += 1
                if self._depth > MAX_DEPTH:
                    raise PeerError(f"a message nests deeper than {MAX_DEPTH}")
            else:
                self._depth -= 1
                if not self._depth:
                    return self._at


def _end(pattern: re.Pattern[bytes], text: bytes) -> int:
    found = pattern.match(text)
    return found.end() if found else 0
