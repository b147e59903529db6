# SPDX-License-Identifier: Apache-2.0
"""Parse the untrusted bodies of NBD options, and encode their replies.

Stateless. A malformed body is BadOptionError: the caller refuses the option and the conversation
goes on, since the header gives the body's length.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cowshed.transport.nbd.wire import MAX_STRING_BYTES, REPLY_HEADER, REPLY_MAGIC, Info, Reply

__all__ = [
    "BadOptionError",
    "ContextQuery",
    "InfoRequest",
    "export_name",
    "info_reply",
    "parse_context_query",
    "parse_info_request",
    "reply",
]

_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")
# No honest client asks for more.
_MAX_QUERIES: Final = 64


class BadOptionError(Exception):
    """An option's body is malformed, or only too_big; the text says why."""

    def __init__(self, why: str, *, too_big: bool = False) -> None:
        super().__init__(why)
        self.too_big: Final = too_big


@dataclass(frozen=True)
class InfoRequest:
    """The body of INFO and GO: an export, and the information wanted of it."""

    name: str
    wanted: frozenset[int]


@dataclass(frozen=True)
class ContextQuery:
    """The body of LIST_META_CONTEXT and SET_META_CONTEXT: an export, and names or prefixes."""

    name: str
    queries: tuple[str, ...]


class _Cursor:
    """Takes numbers and strings off the front of an option's body."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._place = 0

    def number(self, layout: struct.Struct) -> int:
        end = self._place + layout.size
        if end > len(self._body):
            raise BadOptionError("the option ends in the middle of a number")
        (value,) = layout.unpack_from(self._body, self._place)
        self._place = end
        return int(value)

    def string(self) -> str:
        length = self.number(_U32)
        end = self._place + length
        if end > len(self._body):
            raise BadOptionError(f"a string of {length} bytes goes past the option's end")
        text = export_name(self._body[self._place : end])
        self._place = end
        return text

    def end(self) -> None:
        if self._place != len(self._body):
            raise BadOptionError(f"{len(self._body) - self._place} bytes too many in the option")


def export_name(body: bytes) -> str:
    """Read a string of the protocol: at most 4096 bytes of UTF-8 without NUL."""
    if len(body) > MAX_STRING_BYTES:
        raise BadOptionError(
            f"a name of {len(body)} bytes: {MAX_STRING_BYTES} at most", too_big=True
        )
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadOptionError("a name is not UTF-8") from error
    if "\0" in text:
        raise BadOptionError("a name has a NUL in it")
    return text


def parse_info_request(body: bytes) -> InfoRequest:
    """Read the body of INFO or GO; repeated information requests count once."""
    cursor = _Cursor(body)
    name = cursor.string()
    wanted = frozenset(cursor.number(_U16) for _ in range(cursor.number(_U16)))
    cursor.end()
    return InfoRequest(name, wanted)


def parse_context_query(body: bytes) -> ContextQuery:
    """Read the body of LIST_META_CONTEXT or SET_META_CONTEXT."""
    cursor = _Cursor(body)
    name = cursor.string()
    nr_queries = cursor.number(_U32)
    if nr_queries > _MAX_QUERIES:
        raise BadOptionError(f"{nr_queries} queries: {_MAX_QUERIES} at most", too_big=True)
    queries = tuple(cursor.string() for _ in range(nr_queries))
    cursor.end()
    for query in queries:
        if ":" not in query:
            raise BadOptionError("a query without a colon names no context: write NAMESPACE:NAME")
    return ContextQuery(name, queries)


def reply(option: int, kind: Reply, payload: bytes | str = b"") -> bytes:
    """Encode one reply to an option; a str payload is text for the client's user."""
    payload = payload.encode() if isinstance(payload, str) else payload
    return REPLY_HEADER.pack(REPLY_MAGIC, option, kind, len(payload)) + payload


def info_reply(option: int, kind: Info, layout: str, values: Sequence[int | bytes]) -> bytes:
    """Encode one INFO reply, its payload packed big-endian."""
    return reply(option, Reply.INFO, struct.pack(f">H{layout}", kind, *values))
