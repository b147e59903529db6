# SPDX-License-Identifier: Apache-2.0
"""An image over a network: bytes by request instead of pages in the guest's memory.

The same interface as Disk (disk.py), with mapped False and no view. The backend keeps what is
written under the guest's name and token, so a broken connection can be replaced: reads and writes
in flight are sent again, which is safe because a guest's writes are private and idempotent. A call
fails with PeerError once nothing has come from the backend for `timeout` seconds, whether the
backend is silent or cannot be reached. If the backend has lost what this guest wrote (it was
killed, and keeps overlays in memory), every later call fails.

Large reads and writes are split and kept in flight; sequential reads are read ahead. Bytes read
ahead may be stale if another connection of the same guest writes meanwhile. For any thread; starts
none, except the relay of a tls connection.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cowshed.cache.errors import PeerError, UsageError
from cowshed.transport.guest.forks import forget_in_child
from cowshed.transport.nbd.block_link import BlockOp, Kind
from cowshed.transport.nbd.block_pump import BlockPump, LinkLostError
from cowshed.transport.nbd.readahead import ReadAhead

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from cowshed.transport.guest.disk import Disk

__all__ = ["ByteDisk", "Dialled", "check_writable"]

PAGE_BYTES: Final = 4096
PIECE_BYTES: Final = 512 << 10
REQUEST_SECONDS: Final = 30.0
READAHEAD_BYTES: Final = 4 << 20
# The first retry is immediate: the listener outlives the backend, or tells where the guest is now.
_PAUSE_SECONDS: Final = 0.02
_MAX_PAUSE_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Dialled:
    """A connection in its transmission phase, and what it serves; the receiver owns sock.

    generation changes if the image is replaced, overlay if the guest's private pages were lost.
    """

    sock: socket.socket
    size_bytes: int
    extent_bytes: int = PAGE_BYTES
    digest: str = ""
    generation: str = ""
    overlay: str = ""


def check_writable(disk: Disk | ByteDisk) -> None:
    """Raise UsageError if the disk was opened read-only."""
    if disk.read_only:
        raise UsageError(
            f"disk {disk.image!r} was opened read-only; open it without read_only to write"
        )


class ByteDisk:
    """An image opened over a network, or anything that NBD serves.

    dial(timeout) makes the first and every later connection. All must have the same size and
    generation and, once something was written, the same overlay. An operation in flight is on
    _pump, or on a lost pump that will not finish it. _ahead maps the offsets of readahead requests
    that no write has overlapped since they were sent.
    """

    mapped: Final = False

    def __init__(
        self,
        dial: Callable[[float], Dialled],
        image: str,
        guest: str,
        *,
        origin: str = "",
        timeout: float = REQUEST_SECONDS,
        readahead_bytes: int = READAHEAD_BYTES,
        read_only: bool = False,
    ) -> None:
        self.read_only: Final = read_only
        self.image: Final = image
        self.guest: Final = guest
        self.origin: Final = origin
        self._dial = dial
        self._timeout = timeout
        self._state = "closed"
        self._lock = threading.Lock()
        self._link_lock = threading.Lock()
        self._lost = ""
        self._written = False
        first = dial(timeout)
        self._overlay = first.overlay
        self.size_bytes: Final = first.size_bytes
        self.extent_bytes: Final = first.extent_bytes
        self.digest: Final = first.digest
        self.generation: Final = first.generation
        self._pump: BlockPump | None = BlockPump(first.sock)
        self._readahead = ReadAhead(self.size_bytes, readahead_bytes)
        self._ahead: dict[int, BlockOp] = {}
        self._ahead_max = readahead_bytes
        self._state = "open"
        forget_in_child(self)

    def __enter__(self) -> ByteDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_state", "closed") == "open":
            warnings.warn(f"disk {self.image!r} was not closed", ResourceWarning, stacklevel=1)
            self.close()

    @property
    def alive(self) -> bool:
        """Whether the backend is connected; if not, calls try to reach it until their timeout."""
        pump = self._pump
        return pump is not None and pump.alive

    @property
    def view(self) -> memoryview:
        """Always UsageError: the image's pages are not in this process's memory."""
        raise UsageError(
            f"disk {self.image!r} has no view: over {self.origin or 'a network'} pages cannot be "
            "mapped; use read and write, or connect by unix:// on the backend's host"
        )

    def read(self, offset: int, length: int) -> bytes:
        """Return the bytes of a range.

        Raises UsageError for a range outside the image, OSError (EIO) if the backend cannot load
        it, PeerError if the backend is gone.
        """
        self._check_range("read", offset, length)
        if length == 0:
            return b""
        result = bytearray(length)
        memory = memoryview(result)
        with self._lock:
            ahead = [op for op in self._ahead.values() if _overlap(op, offset, length)]
        ops: list[BlockOp] = []
        at = offset
        for op in sorted(ahead, key=lambda op: op.offset):
            ops += _pieces(Kind.READ, at, op.offset - at, memory[at - offset :])
            at = max(at, op.offset + op.length)
        ops += _pieces(Kind.READ, at, offset + length - at, memory[at - offset :])
        # Send the readahead before waiting for this read, so that both are in flight.
        asked = self._ask_ahead(offset, length)
        try:
            self._perform("read", [*ops, *ahead], asked)
        except OSError:
            if not any(op.error for op in ahead):
                raise
            # The error may be outside the wanted range: read that range alone.
            with self._lock:
                self._ahead = {at: op for at, op in self._ahead.items() if op not in ahead}
            ahead = []
            self._perform("read", _pieces(Kind.READ, offset, length, memory))
        for op in ahead:
            _copy_part(op, offset, memory)
        with self._lock:
            for op in ahead:
                if op.offset + op.length <= offset + length and self._ahead.get(op.offset) is op:
                    del self._ahead[op.offset]
        memory.release()
        return bytes(result)

    def write(self, offset: int, data: ReadableBuffer) -> int:
        """Write bytes, private to this guest, and return their number once the backend has them.

        Raises as read does, and OSError (ENOSPC) at the guest's quota: part may be written then.
        """
        check_writable(self)
        with memoryview(data).cast("B") as source:
            length = len(source)
            self._check_range("write", offset, length)
            self._change("write", _pieces(Kind.WRITE, offset, length, source), offset, length)
        return length

    def discard(self, offset: int, length: int) -> None:
        """Give back private pages: the range reads as the image again.

        Raises UsageError unless offset is a multiple of 4096 and the end one too, or the image's.
        """
        self._check_range("discard", offset, length)
        end = offset + length
        if offset % PAGE_BYTES or (end % PAGE_BYTES and end != self.size_bytes):
            raise UsageError(
                f"discard of {length} bytes at {offset} is not of whole 4096-byte pages"
            )
        ops = _pieces(Kind.TRIM, offset, length, None, 1 << 30)
        self._change("discard", ops, offset, length)

    def flush(self) -> None:
        """Have the backend flush what was written to where it keeps overlays."""
        self._check_open()
        self._perform("flush", [BlockOp(Kind.FLUSH)])

    def close(self) -> None:
        """Detach; the backend keeps the guest's private pages as long as it is configured to.

        Idempotent. Calls in progress raise UsageError.
        """
        with self._lock:
            if self._state != "open":
                return
            self._state = "closed"
            self._ahead.clear()
            pump, self._pump = self._pump, None
        if pump is not None:
            pump.close(politely=True)

    def forget(self) -> None:
        """In a forked child: close the copy of the socket, and refuse use."""
        if self._state == "open":
            self._state = "forked"
        self._lock, self._link_lock = threading.Lock(), threading.Lock()
        pump, self._pump = self._pump, None
        if pump is not None:
            pump.abandon()

    def _change(self, what: str, ops: Sequence[BlockOp], offset: int, length: int) -> None:
        if not ops:
            self._check_open()
            return
        self._written = True
        try:
            self._perform(what, ops)
        finally:
            # Not earlier: another thread may have read ahead while this write was in flight.
            with self._lock:
                for op in [op for op in self._ahead.values() if _overlap(op, offset, length)]:
                    del self._ahead[op.offset]

    def _ask_ahead(self, offset: int, length: int) -> list[BlockOp]:
        """Choose what to read ahead; the requests go out with the next batch, and no call waits."""
        with self._lock:
            asked = []
            for at, size in self._readahead.note(offset, length):
                held = sum(op.length for op in self._ahead.values())
                if at in self._ahead or held + size > 2 * self._ahead_max:
                    self._drop_oldest_ahead()
                if at not in self._ahead:
                    op = BlockOp(Kind.READ, at, size, memoryview(bytearray(size)))
                    self._ahead[at] = op
                    asked.append(op)
        return asked

    def _drop_oldest_ahead(self) -> None:
        first = next(iter(self._ahead), None)
        if first is not None:
            del self._ahead[first]

    def _perform(self, what: str, ops: Sequence[BlockOp], asked: Sequence[BlockOp] = ()) -> None:
        """Have ops done, over as many connections as needed; asked go out with the first only."""
        self._check_open()
        deadline = time.monotonic() + self._timeout
        pause = 0.0
        while True:
            nr_done = sum(op.done for op in ops)
            try:
                pump = self._connected(deadline)
                pump.queue([op for op in ops if not op.flying and not op.done])
                if asked:
                    pump.queue(asked)
                pump.run(ops, self._timeout)
                break
            except LinkLostError as error:
                self._check_open()
                asked = ()
                self._drop_link(pump)
                if sum(op.done for op in ops) > nr_done:
                    deadline = time.monotonic() + self._timeout
                if time.monotonic() + pause >= deadline:
                    raise self._gone(what, error) from error
                for op in ops:
                    if not op.done:
                        op.reset()
            except PeerError as error:
                self._check_open()
                if self._lost or time.monotonic() + pause >= deadline:
                    raise self._gone(what, error) from error
            time.sleep(pause)
            pause = min(_MAX_PAUSE_SECONDS, max(_PAUSE_SECONDS, 2 * pause))
        for op in ops:
            if op.error:
                self._check_open()  # a server may fail requests that NBD_CMD_DISC overtook
                note = f" ({op.why})" if op.why else ""
                raise OSError(
                    op.error,
                    f"{what} of {op.length} bytes at {op.offset} of image {self.image!r}: "
                    f"{os.strerror(op.error)}{note}",
                )

    def _connected(self, deadline: float) -> BlockPump:
        """Return the current connection, or a new one; PeerError if connecting fails."""
        # Another thread may be connecting, which takes no longer than our own try would.
        if not self._link_lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise PeerError(f"no connection in {self._timeout:g} s")
        try:
            if self._lost:
                raise PeerError(self._lost)
            self._check_open()
            if self._pump is None:
                again = self._dial(max(0.05, deadline - time.monotonic()))
                try:
                    self._check_same(again)
                except BaseException:
                    again.sock.close()
                    raise
                self._pump = BlockPump(again.sock)
            return self._pump
        finally:
            self._link_lock.release()

    def _check_same(self, again: Dialled) -> None:
        if (again.size_bytes, again.generation) != (self.size_bytes, self.generation):
            self._lost = f"image {self.image!r} was replaced while the connection was away"
        elif again.overlay != self._overlay and self._written:
            self._lost = f"the backend has lost what guest {self.guest!r} wrote to {self.image!r}"
        if self._lost:
            self._lost += "; open it anew"
            raise PeerError(self._lost)
        self._overlay = again.overlay

    def _drop_link(self, pump: BlockPump) -> None:
        pump.close()
        with self._link_lock:
            if self._pump is pump:
                self._pump = None
        with self._lock:
            self._ahead.clear()
            self._readahead.forget()

    def _gone(self, what: str, error: Exception) -> PeerError:
        if self._lost:
            return PeerError(f"{what}: {self._lost}")
        return PeerError(
            f"{what} of image {self.image!r}: the backend {self.origin} is gone "
            f"({error}); tried for {self._timeout:g} s"
        )

    def _check_range(self, what: str, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise UsageError(
                f"{what} of {length} bytes at {offset} is outside image {self.image!r}; "
                f"stay within its {self.size_bytes} bytes"
            )
        self._check_open()

    def _check_open(self) -> None:
        if self._state == "forked":
            raise UsageError(f"disk {self.image!r} was opened before a fork; open it again here")
        if self._state != "open":
            raise UsageError(f"disk {self.image!r} is closed; open it again")


def _pieces(
    kind: Kind,
    offset: int,
    length: int,
    memory: memoryview | None,
    piece_bytes: int = PIECE_BYTES,
) -> list[BlockOp]:
    ops = []
    for start in range(0, length, piece_bytes):
        size = min(piece_bytes, length - start)
        part = None if memory is None else memory[start : start + size]
        ops.append(BlockOp(kind, offset + start, size, part))
    return ops


def _overlap(op: BlockOp, offset: int, length: int) -> bool:
    return op.offset < offset + length and offset < op.offset + op.length


def _copy_part(op: BlockOp, offset: int, memory: memoryview) -> None:
    assert op.memory is not None
    start = max(offset, op.offset)
    end = min(offset + len(memory), op.offset + op.length)
    memory[start - offset : end - offset] = op.memory[start - op.offset : end - op.offset]
