# SPDX-License-Identifier: Apache-2.0
"""The client's half of NBD's transmission phase, without a socket: operations in, bytes out.

    link.start(op)         -> bytes to send
    link.feed(bytes)       received bytes; or link.target() and link.advance(n), which saves a copy
    link.take_finished()   -> the operations that are done

Takes simple and structured replies, in any order (doc/proto.md of NetworkBlockDevice/nbd). Received
bytes are untrusted: every violation is PeerError, after which the link must not be used. Data goes
to the operations' memory; replies add at most _MAX_NOTE_BYTES.
"""

from __future__ import annotations

import enum
import errno
import struct
from dataclasses import dataclass, field
from typing import Final

from cowshed.cache.errors import PeerError

__all__ = ["BlockLink", "BlockOp", "Kind"]

_REQUEST: Final = struct.Struct(">IHHQQI")
_SIMPLE: Final = struct.Struct(">IIQ")
_CHUNK: Final = struct.Struct(">IHHQI")
_REQUEST_MAGIC: Final = 0x25609513
_SIMPLE_MAGIC: Final = 0x67446698
_CHUNK_MAGIC: Final = 0x668E33EF
_DONE: Final = 1
_NONE, _DATA, _HOLE = 0, 1, 2
_ERROR, _ERROR_OFFSET = 0x8001, 0x8002
_ERROR_BIT: Final = 0x8000
_MAX_NOTE_BYTES: Final = 4096 + 64


class Kind(enum.IntEnum):
    """The kind of an operation; the numbers are NBD's."""

    READ = 0
    WRITE = 1
    DISCONNECT = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5


@dataclass(eq=False)
class BlockOp:
    """One operation. memory, of length bytes, is written from or read into.

    error is an errno once done, 0 for success.
    """

    kind: Kind
    offset: int = 0
    length: int = 0
    memory: memoryview | None = None
    done: bool = False
    error: int = 0
    why: str = ""
    flying: bool = False
    began: float = 0.0
    _got: int = 0

    def reset(self) -> None:
        """Reset the operation to its state before it was sent, to send it again."""
        self.done, self.flying, self.error, self.why, self._got = False, False, 0, "", 0


@dataclass
class BlockLink:
    """The client's half of one connection.

    _flying maps cookies to the operations in flight, oldest first. The next step needs _need bytes,
    in _into if that is set, else in _note.
    """

    _flying: dict[int, BlockOp] = field(default_factory=dict)
    _finished: list[BlockOp] = field(default_factory=list)
    _note: bytearray = field(default_factory=bytearray)
    _into: memoryview | None = None
    _need: int = _SIMPLE.size
    _then: str = "header"
    _op: BlockOp | None = None
    _cookie: int = 0
    _last_cookie: int = 0
    _nr_data: int = 0
    _kind: int = 0
    _flags: int = 0

    @property
    def nr_flying(self) -> int:
        """The number of operations in flight."""
        return len(self._flying)

    @property
    def oldest(self) -> BlockOp | None:
        """The operation that has been in flight longest."""
        return next(iter(self._flying.values()), None)

    def start(self, op: BlockOp) -> list[bytes | memoryview]:
        """Return the pieces to send for op, in order."""
        self._last_cookie += 1
        head = _REQUEST.pack(_REQUEST_MAGIC, 0, op.kind, self._last_cookie, op.offset, op.length)
        if op.kind is Kind.DISCONNECT:
            return [head]
        self._flying[self._last_cookie] = op
        if op.kind is Kind.WRITE:
            assert op.memory is not None
            return [head, op.memory]
        return [head]

    def take_finished(self) -> list[BlockOp]:
        """Return the operations that were finished since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def target(self) -> memoryview | None:
        """Return where to put the next bytes if they are data; the caller must then advance()."""
        return self._into

    def advance(self, nr_bytes: int) -> None:
        """Record that nr_bytes were put into target(), from its start."""
        assert self._into is not None
        assert nr_bytes <= len(self._into)
        self._into = self._into[nr_bytes:]
        self._need -= nr_bytes
        if not self._need:
            self._step()

    def feed(self, arrived: bytes | memoryview) -> None:
        """Take received bytes, as many or few as came."""
        rest = memoryview(arrived)
        while rest:
            piece, rest = rest[: self._need], rest[self._need :]
            if self._into is not None:
                self._into[: len(piece)] = piece
                self.advance(len(piece))
                continue
            self._note += piece
            self._need -= len(piece)
            if not self._need:
                self._step()

    # Each step has all the bytes it needs, and sets what the next one needs.

    def _step(self) -> None:
        while not self._need:
            step, self._then = self._then, ""
            getattr(self, f"_on_{step}")()

    def _want(self, nr_bytes: int, then: str, into: memoryview | None = None) -> None:
        self._need, self._then, self._into = nr_bytes, then, into
        if into is None:
            self._note = bytearray()

    def _on_header(self) -> None:
        magic, error, cookie = _SIMPLE.unpack(self._note)
        if magic == _CHUNK_MAGIC:
            self._need, self._then = _CHUNK.size - _SIMPLE.size, "chunk"
            return
        if magic != _SIMPLE_MAGIC:
            raise PeerError(f"reply begins with {magic:#010x}: not a block server")
        op = self._find(cookie)
        self._flags = _DONE
        if error:
            self._fail(op, error, "")
        elif op.kind is Kind.READ:
            assert op.memory is not None
            op._got = op.length
            self._want(op.length, "end", op.memory)
            return
        self._on_end()

    def _on_chunk(self) -> None:
        _, self._flags, self._kind, cookie, length = _CHUNK.unpack(self._note)
        op = self._find(cookie)
        if self._flags & ~_DONE:
            raise PeerError(f"reply has unknown flags {self._flags:#x}")
        if self._kind == _NONE:
            if length or not self._flags & _DONE:
                raise PeerError("a reply chunk of type NONE has a payload, or is not the last")
            self._on_end()
        elif self._kind == _DATA and op.kind is Kind.READ:
            if not 8 < length <= op.length - op._got + 8:
                raise PeerError(f"peer sent {length - 8} bytes; {op.length - op._got} are left")
            self._nr_data = length - 8
            self._want(8, "data")
        elif self._kind == _HOLE and op.kind is Kind.READ and length == 12:
            self._want(12, "hole")
        elif self._kind & _ERROR_BIT and 6 <= length <= _MAX_NOTE_BYTES:
            self._want(length, "error")
        else:
            raise PeerError(f"reply of type {self._kind} with {length} bytes to {op.kind.name}")

    def _on_data(self) -> None:
        (offset,) = struct.unpack(">Q", self._note)
        length = self._nr_data
        self._want(length, "end", self._place(offset, length))

    def _on_hole(self) -> None:
        offset, length = struct.unpack(">QI", self._note)
        self._place(offset, length)[:] = bytes(length)
        self._on_end()

    def _on_error(self) -> None:
        assert self._op is not None
        error, length = struct.unpack_from(">IH", self._note)
        if error == 0 or 6 + length > len(self._note):
            raise PeerError("malformed error reply")
        text = bytes(self._note[6 : 6 + length]).decode("utf-8", "replace")
        self._fail(self._op, error, "".join(c if c.isprintable() else "?" for c in text))
        self._on_end()

    def _on_end(self) -> None:
        op = self._op
        assert op is not None
        self._want(_SIMPLE.size, "header")
        if not self._flags & _DONE:
            return
        if op.kind is Kind.READ and not op.error and op._got != op.length:
            raise PeerError(f"peer sent {op._got} of {op.length} bytes that were read")
        del self._flying[self._cookie]
        op.done = True
        self._finished.append(op)

    def _find(self, cookie: int) -> BlockOp:
        op = self._flying.get(cookie)
        if op is None:
            raise PeerError(f"reply to request {cookie:#x}, which is not in flight")
        self._op, self._cookie = op, cookie
        return op

    def _place(self, offset: int, length: int) -> memoryview:
        op = self._op
        assert op is not None
        assert op.memory is not None
        start = offset - op.offset
        if start < 0 or length == 0 or start + length > op.length or op._got + length > op.length:
            raise PeerError(
                f"peer sent {length} bytes at {offset} for a read of {op.length} at {op.offset}"
            )
        op._got += length
        return op.memory[start : start + length]

    @staticmethod
    def _fail(op: BlockOp, error: int, why: str) -> None:
        # NBD's error numbers are Linux's; take an unknown one as EIO.
        op.error = error if error in errno.errorcode else errno.EIO
        op.why = why
