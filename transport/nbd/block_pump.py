# SPDX-License-Identifier: Apache-2.0
"""Many threads' block operations over one socket: sent in batches, answered in any order.

One of the waiting threads pumps at a time: it sends what all have queued and receives every reply.
The others sleep until their operations are done or they must pump. So the pump needs no thread of
its own, sending never blocks on a peer that waits for its replies to be read, and operations with
no waiter yet (readahead) are sent and received along.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

from cowshed.cache.errors import PeerError
from cowshed.transport.nbd.block_link import BlockLink, BlockOp, Kind

__all__ = ["BlockPump", "LinkLostError"]

MAX_FLYING: Final = 128
MAX_FLYING_BYTES: Final = 16 << 20
_MAX_VECTORS: Final = 64
_SCRATCH_BYTES: Final = 256 << 10
_RECV_AT_ONCE: Final = 32
# An operation may take this many times as long as the whole link may be silent.
_PATIENCE: Final = 4
_GOODBYE_SECONDS: Final = 5.0


class LinkLostError(PeerError):
    """The connection ended or went silent; operations in flight may be sent on a new one."""


class BlockPump:
    """One connection in its transmission phase, owned: close() closes it.

    Invariants, under _lock: (1) _pumping is set while one thread is in a step; (2) _flying_bytes is
    the sum of lengths in flight, at most MAX_FLYING_BYTES unless there is only one operation;
    (3) once _error is set, nothing is sent or received.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._link = BlockLink()
        self._lock = threading.Condition()
        self._queued: deque[BlockOp] = deque()
        self._outgoing: deque[bytes | memoryview] = deque()
        self._flying_bytes = 0
        self._last_progress = time.monotonic()
        self._pumping = False
        self._error: LinkLostError | None = None
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    @property
    def alive(self) -> bool:
        """Whether the peer still holds its end open. Costs a system call."""
        with self._lock:
            if self._error is not None:
                return False
            poll = select.poll()
            poll.register(self._sock, select.POLLRDHUP)
            return not poll.poll(0)

    def close(self, *, politely: bool = False) -> None:
        """Close the connection: waiting threads get LinkLostError. Idempotent.

        politely: send NBD_CMD_DISC and wait at most _GOODBYE_SECONDS for the peer to close.
        """
        with self._lock:
            if politely and self._error is None and not self._pumping:
                with contextlib.suppress(OSError, PeerError):
                    self._send_goodbye(time.monotonic() + _GOODBYE_SECONDS)
            self._fail(LinkLostError("the connection was closed"))

    def abandon(self) -> None:
        """In a forked child: close the descriptors only; the state of locks is unknown."""
        with contextlib.suppress(OSError):
            self._sock.close()
            os.close(self._wake_fd)

    def queue(self, ops: Sequence[BlockOp]) -> None:
        """Queue operations for the next batch, and send them if no thread pumps; never waits."""
        with self._lock:
            if self._error is None:
                self._queue(ops)
                if not self._pumping:
                    self._attempt()

    def run(self, ops: Sequence[BlockOp], timeout: float) -> None:
        """Queue operations that are not queued yet, and wait until all are done.

        Raises LinkLostError if the connection ends, or the peer sends nothing for timeout seconds.
        Operations that are not done then may be sent again on another connection.
        """
        with self._lock:
            self._queue([op for op in ops if not op.flying and not op.done])
            began = time.monotonic()
            while not all(op.done for op in ops):
                if self._error is not None:
                    raise LinkLostError(str(self._error)) from self._error
                if self._pumping:
                    os.eventfd_write(self._wake_fd, 1)
                    self._lock.wait(timeout)
                    continue
                self._pump_once(max(began, self._last_progress) + timeout, timeout)

    def _queue(self, ops: Sequence[BlockOp]) -> None:
        for op in ops:
            op.flying = True
        self._queued += ops

    def _attempt(self) -> None:
        try:
            self._fill()
            self._send()
        except OSError as error:
            self._fail(LinkLostError(f"cannot send: {error.strerror}"))

    def _pump_once(self, deadline: float, timeout: float) -> None:
        """Make one step, with the lock held except during the wait."""
        self._pumping = True
        try:
            self._fill()
            self._send()
            if not self._receive():
                oldest = self._link.oldest
                if oldest is not None:
                    deadline = min(deadline, oldest.began + _PATIENCE * timeout)
                self._wait(deadline)
                if time.monotonic() >= deadline:
                    raise LinkLostError(f"no answer in {timeout:g} s")
        except LinkLostError as error:
            self._fail(error)
        except PeerError as error:
            self._fail(LinkLostError(str(error)))
        except OSError as error:
            self._fail(LinkLostError(error.strerror or str(error)))
        except BaseException:
            # An interrupt in the middle of a request leaves a stream that cannot be used.
            self._fail(LinkLostError("interrupted"))
            raise
        finally:
            self._pumping = False
            if self._error is not None:
                self._release()
            self._lock.notify_all()

    def _fill(self) -> None:
        while self._queued and self._link.nr_flying < MAX_FLYING:
            length = self._queued[0].length
            if self._flying_bytes and self._flying_bytes + length > MAX_FLYING_BYTES:
                return
            op = self._queued.popleft()
            op.began = time.monotonic()
            self._flying_bytes += length
            self._outgoing += self._link.start(op)

    def _send(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._outgoing:
                batch = [self._outgoing[no] for no in range(min(len(self._outgoing), _MAX_VECTORS))]
                sent = self._sock.sendmsg(batch, (), socket.MSG_NOSIGNAL)
                while self._outgoing and sent >= len(self._outgoing[0]):
                    sent -= len(self._outgoing.popleft())
                if sent:
                    self._outgoing[0] = memoryview(self._outgoing[0])[sent:]

    def _receive(self) -> bool:
        """Receive what has arrived; False if nothing had."""
        link = self._link
        for no in range(_RECV_AT_ONCE):
            target = link.target()
            try:
                if target is not None and len(target) >= len(self._scratch) // 4:
                    nr_bytes = self._sock.recv_into(target)
                    link.advance(nr_bytes)
                else:
                    nr_bytes = self._sock.recv_into(self._scratch)
                    link.feed(self._scratch[:nr_bytes])
            except BlockingIOError:
                return no > 0
            if not nr_bytes:
                raise LinkLostError("the peer closed the connection")
            self._last_progress = time.monotonic()
            finished = link.take_finished()
            for op in finished:
                self._flying_bytes -= op.length
            if finished:
                return True
        return True

    def _wait(self, deadline: float) -> None:
        poll = select.poll()
        poll.register(self._sock, select.POLLIN | (select.POLLOUT if self._outgoing else 0))
        poll.register(self._wake_fd, select.POLLIN)
        self._lock.release()
        try:
            poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        finally:
            self._lock.acquire()
        if self._error is not None:
            raise self._error
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)

    def _send_goodbye(self, deadline: float) -> None:
        """Send NBD_CMD_DISC and wait for the peer to close: the guest's name is free again then."""
        self._queued.clear()
        self._outgoing += self._link.start(BlockOp(Kind.DISCONNECT))
        poll = select.poll()
        while (left := deadline - time.monotonic()) > 0:
            self._send()
            poll.register(self._sock, select.POLLIN | (select.POLLOUT if self._outgoing else 0))
            if not poll.poll(left * 1000):
                return
            while self._receive():  # raises LinkLostError at the end of the stream
                pass

    def _fail(self, error: LinkLostError) -> None:
        if self._error is None:
            self._error = error
            self._queued.clear()
            self._outgoing.clear()
            # The pumping thread may sleep on these descriptors: wake it, and let it close them.
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            if not self._pumping:
                self._release()
        self._lock.notify_all()

    def _release(self) -> None:
        if self._sock.fileno() >= 0:
            self._sock.close()
            os.close(self._wake_fd)
