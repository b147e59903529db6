# SPDX-License-Identifier: Apache-2.0
"""A client of NBD's transmission phase for tests: it sends any request, valid or not."""

from __future__ import annotations

import itertools
import socket
import struct
from dataclasses import dataclass, field
from typing import Any

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD = (1 << bit for bit in range(6))
COMPACT, EXTENDED = 0x25609513, 0x21E41C71
SIMPLE, CHUNK, EXTENDED_CHUNK = 0x67446698, 0x668E33EF, 0x6E8A278C
NONE, DATA, STATUS_CHUNK, STATUS_EXT, ERROR = 0, 1, 5, 6, 0x8001
SECONDS = 60.0


@dataclass
class Reply:
    """All chunks of one reply. runs: by context id, the (length, status) of each descriptor."""

    cookie: int
    error: int = 0
    data: bytes = b""
    nr_chunks: int = 0
    runs: dict[int, list[tuple[int, int]]] = field(default_factory=dict)


class Client:
    """One connection, with its negotiated options; the cookie identifies replies."""

    def __init__(self, link: socket.socket, *, structured: bool, extended: bool) -> None:
        self.link = link
        self.structured = structured
        self.extended = extended
        self.connection_no = 0
        self._cookies = itertools.count(1)
        self._lengths: dict[int, tuple[int, int, int]] = {}
        self._half: dict[int, tuple[Reply, bytearray]] = {}
        self._whole: dict[int, Reply] = {}
        self.order: list[int] = []
        link.settimeout(SECONDS)

    def header(
        self, kind: int, offset: int, length: int, flags: int = 0, payload: bytes | None = None
    ) -> tuple[int, bytes]:
        """Return a request's header as negotiated, and its cookie."""
        cookie = next(self._cookies)
        self._lengths[cookie] = (kind, offset, length)
        if not self.extended:
            return cookie, struct.pack(">IHHQQI", COMPACT, flags, kind, cookie, offset, length)
        flags |= PAYLOAD if payload is not None else 0
        return cookie, struct.pack(">IHHQQQ", EXTENDED, flags, kind, cookie, offset, length)

    def start(
        self,
        kind: int,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        payload: bytes | None = None,
    ) -> int:
        """Send a request; return its cookie."""
        if payload is not None and kind == WRITE:
            length = len(payload)
        cookie, header = self.header(kind, offset, length, flags, payload)
        self.link.sendall(header + (payload or b""))
        return cookie

    def _exactly(self, nr_bytes: int) -> bytes:
        got = bytearray()
        while len(got) < nr_bytes:
            more = self.link.recv(nr_bytes - len(got))
            if not more:
                raise EOFError(f"closed after {len(got)} of {nr_bytes} bytes")
            got += more
        return bytes(got)

    def hear(self) -> int | None:
        """Receive one message; return the cookie of the reply that it ended, or None."""
        (magic,) = struct.unpack(">I", self._exactly(4))
        if magic == SIMPLE:
            assert not self.extended, "a simple reply with extended headers"
            error, cookie = struct.unpack(">IQ", self._exactly(12))
            kind, _, length = self._lengths[cookie]
            assert not (self.structured and kind == READ), "a simple reply to a structured read"
            data = self._exactly(length) if kind == READ and not error else b""
            return self._end(Reply(cookie, error, data, 1))
        assert magic == (EXTENDED_CHUNK if self.extended else CHUNK), hex(magic)
        if self.extended:
            flags, kind, cookie, offset, length = struct.unpack(">HHQQQ", self._exactly(28))
            assert offset == self._lengths[cookie][1]
        else:
            flags, kind, cookie, length = struct.unpack(">HHQI", self._exactly(16))
        if cookie not in self._half:
            wanted, _, read_length = self._lengths[cookie]
            self._half[cookie] = Reply(cookie), bytearray(read_length if wanted == READ else 0)
        reply, data_so_far = self._half[cookie]
        reply.nr_chunks += 1
        self._chunk(reply, data_so_far, kind, self._exactly(length))
        if not flags & 1:
            return None
        del self._half[cookie]
        reply.data = bytes(data_so_far) if not reply.error else b""
        return self._end(reply)

    def _chunk(self, reply: Reply, data: bytearray, kind: int, body: bytes) -> None:
        if kind == DATA:
            (offset,) = struct.unpack_from(">Q", body)
            start = offset - self._lengths[reply.cookie][1]
            assert 0 <= start <= len(data) - len(body) + 8
            data[start : start + len(body) - 8] = body[8:]
        elif kind == ERROR:
            reply.error, text_length = struct.unpack_from(">IH", body)
            assert reply.error
            assert len(body) == 6 + text_length
        elif kind in (STATUS_CHUNK, STATUS_EXT):
            assert (kind == STATUS_EXT) == self.extended
            if self.extended:
                context, count = struct.unpack_from(">II", body)
                runs = list(struct.iter_unpack(">QQ", body[8:]))
                assert count == len(runs)
            else:
                (context,) = struct.unpack_from(">I", body)
                runs = list(struct.iter_unpack(">II", body[4:]))
            assert runs
            assert context not in reply.runs
            reply.runs[context] = [(int(length), int(status)) for length, status in runs]
        else:
            assert (kind, body) == (NONE, b"")

    def _end(self, reply: Reply) -> int:
        self._whole[reply.cookie] = reply
        self.order.append(reply.cookie)
        return reply.cookie

    def finish(self, cookie: int) -> Reply:
        """Wait for a reply; keeps others that come before it."""
        while cookie not in self._whole:
            self.hear()
        return self._whole.pop(cookie)

    def call(self, kind: int, *args: Any, **fields: Any) -> Reply:
        return self.finish(self.start(kind, *args, **fields))

    def read(self, offset: int, length: int, flags: int = 0) -> bytes:
        reply = self.call(READ, offset, length, flags)
        assert reply.error == 0, reply.error
        return reply.data

    def write(self, offset: int, data: bytes, flags: int = 0) -> int:
        return self.call(WRITE, offset, flags=flags, payload=data).error

    def closed(self) -> bool:
        """Wait until the server has closed the connection."""
        try:
            return self.link.recv(1) == b""
        except ConnectionResetError:
            return True
