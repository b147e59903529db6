# SPDX-License-Identifier: Apache-2.0
"""Messages and descriptors over one connected unix sequenced-packet socket.

One packet of the protocol is one packet of the socket. A Connection is used in one of two ways:
send and recv block (a guest, a command); queue, flush and recv_ready never do (the daemon's loop,
which watches fileno() for reading, and for writing while wants_write). For one thread at a time.

The taker of a message owns its descriptors; those of a refused or unfinished message are closed
here. After a PeerError the caller must close().
"""

from __future__ import annotations

import array
import contextlib
import enum
import errno
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

from cowshed.cache.errors import CapacityError, CowshedError, PeerError, PeerGoneError
from cowshed.transport.links.acceptor import NO_ROOM
from cowshed.transport.links.foreign_fds import SCM_MAX_FDS, close_foreign, is_full
from cowshed.transport.links.no_room import no_room
from cowshed.transport.messages.protocol import (
    MAX_FDS,
    MAX_PACKET_BYTES,
    MAX_REPLY_BYTES,
    Body,
    Decoder,
    Message,
    encode,
)

MAX_QUEUED_BYTES: Final = 4 << 20
MAX_QUEUED_FDS: Final = 64
MAX_PACKETS_AT_ONCE: Final = 32
SO_PEERPIDFD: Final = 77  # Linux 6.5; Python has no name for it
GONE: Final = (errno.EPIPE, errno.ECONNRESET)
_UCRED: Final = struct.Struct("3i")
_FD_BYTES: Final = array.array("i").itemsize


class Eof(enum.Enum):
    """The peer has closed the connection."""

    EOF = enum.auto()


EOF: Final = Eof.EOF


@dataclass(frozen=True, slots=True)
class Received(Message):
    """A message with its descriptors, which its taker owns."""

    fds: list[int] = field(default_factory=list)

    def close_fds(self) -> None:
        """Close the descriptors that are still in fds; take those you keep out of it first."""
        close_foreign(self.fds)


class Peer(NamedTuple):
    """The peer's credentials from the kernel; uid and gid are those at the time of connecting.

    The connection owns the pidfd and closes it; None if the kernel gave none.
    """

    pid: int
    uid: int
    gid: int
    pidfd: int | None


class Connection:
    """One connected sequenced-packet socket, owned: close() closes it.

    no_room is the errno for which the server must refuse the peer, 0 if it need not (accept_any).

    Invariants: (1) descriptors in _arrived belong to the decoder's unfinished message, and there
    are none without one; (2) _queued_bytes and _queued_fds are the sums over _queue.
    """

    carries_descriptors = True

    def __init__(
        self,
        sock: socket.socket,
        receive_limit_bytes: int = MAX_REPLY_BYTES,
        send_limit_bytes: int = MAX_REPLY_BYTES,
    ) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._decoder = Decoder(receive_limit_bytes)
        self._send_limit_bytes = send_limit_bytes
        self._arrived: list[int] = []
        self._taken: deque[Received] = deque()
        self._queue: deque[tuple[bytes, list[int]]] = deque()
        self._queued_bytes = 0
        self._queued_fds = 0
        self._next_tag = 1
        self._peer: Peer | None = None
        self._was_reset = False
        self.no_room = 0

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold."""
        self._decoder.check()
        assert self._decoder.unfinished or not self._arrived
        assert self._queued_bytes == sum(len(packet) for packet, _ in self._queue)
        assert self._queued_fds == sum(len(fds) for _, fds in self._queue)

    def limit(self, receive_bytes: int, send_bytes: int) -> None:
        """Limit the size of messages from now on; to be called between messages."""
        self._decoder = Decoder(receive_bytes)
        self._send_limit_bytes = send_bytes

    def limit_sending(self, send_bytes: int) -> None:
        """Limit the size of sent messages from now on."""
        self._send_limit_bytes = send_bytes

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the socket's descriptor, -1 once closed."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket and every descriptor received or queued on it. Idempotent."""
        self._socket.close()
        close_foreign(self._arrived)
        for message in self._taken:
            message.close_fds()
        self._taken.clear()
        for _, fds in self._queue:
            _close_own(fds)
        self._queue.clear()
        self._queued_bytes = self._queued_fds = 0
        if self._peer is not None and self._peer.pidfd is not None:
            os.close(self._peer.pidfd)
            self._peer = self._peer._replace(pidfd=None)

    @property
    def peer(self) -> Peer:
        """The peer's credentials; kept after close, without the pidfd."""
        if self._peer is None:
            raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
            pidfd = None
            # Fails on an older kernel, and if the peer is gone and reaped.
            with contextlib.suppress(OSError):
                pidfd = self._socket.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
            pid, uid, gid = _UCRED.unpack(raw)
            self._peer = Peer(pid, uid, gid, pidfd)
        return self._peer

    def look_at_peer(self) -> int:
        """Read peer; return the errno if this process has no descriptor left for it, else 0."""
        if self.peer.pidfd is None:
            try:
                pidfd = self._socket.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
            except OSError as error:
                return error.errno if error.errno in NO_ROOM else 0
            self._peer = self.peer._replace(pidfd=pidfd)
        return 0

    @property
    def identity(self) -> str:
        """The name in the peer's certificate; "" on a unix socket, where peer identifies it."""
        return ""

    @property
    def peer_name(self) -> str:
        """The peer as text for a log."""
        return f"pid {self.peer.pid} of uid {self.peer.uid}"

    @property
    def alive(self) -> bool:
        """Whether the peer still holds its end open. Costs a system call."""
        if self._socket.fileno() < 0:
            return False
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return not poll.poll(0)

    # Blocking.

    def send(
        self,
        body: Mapping[str, Any],
        fds: Sequence[int] = (),
        tag: int | None = None,
        timeout: float | None = None,
    ) -> int:
        """Send a message and the queue before it; return its tag, a fresh one if none is given.

        fds stay the caller's. Raises UsageError for a bad body, PeerError if the peer has closed
        or does not read all within timeout seconds.
        """
        tag = self.queue(body, fds, tag)
        self.drain(timeout)
        return tag

    def drain(self, timeout: float | None = None) -> None:
        """Send the whole queue; PeerError if the peer has closed or takes too long."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.flush():
            if not self._wait(select.POLLOUT, deadline):
                raise PeerError(f"peer took no message in {timeout:g} s")

    def recv(self, timeout: float | None = None) -> tuple[Body, list[int], int]:
        """Wait for one message; return its body, its descriptors (now the caller's) and its tag.

        Raises PeerError for a closed, silent or misbehaving peer.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._taken:
            got = self._receive()
            if got is EOF:
                raise PeerGoneError("peer closed the connection")
            if got:
                self._taken += got
            elif got is None and not self._wait(select.POLLIN, deadline):
                raise PeerError(f"peer sent no message in {timeout:g} s")
        message = self._taken.popleft()
        return message.body, message.fds, message.tag

    def _wait(self, event: int, deadline: float | None) -> bool:
        poll = select.poll()
        poll.register(self._socket, event)
        if deadline is None:
            return bool(poll.poll())
        return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))

    # Non-blocking.

    @property
    def wants_write(self) -> bool:
        """Whether something is queued that flush could send."""
        return bool(self._queue)

    @property
    def queued_bytes(self) -> int:
        """The bytes queued that the kernel did not take yet."""
        return self._queued_bytes

    def queue(
        self, body: Mapping[str, Any], fds: Sequence[int] = (), tag: int | None = None
    ) -> int:
        """Append a message to the queue; return its tag, a fresh one if none is given.

        fds are duplicated: they stay the caller's. Raises UsageError for a bad body, PeerError if
        more than MAX_QUEUED_BYTES or MAX_QUEUED_FDS are queued, CapacityError if this process has
        no descriptors left; nothing is queued then.
        """
        if tag is None:
            tag = self._next_tag
            self._next_tag = self._next_tag % 0xFFFFFFFF + 1
        packets = encode(tag, body, len(fds), self._send_limit_bytes)
        if self._queued_bytes > MAX_QUEUED_BYTES or self._queued_fds > MAX_QUEUED_FDS:
            raise PeerError(
                f"peer leaves {self._queued_bytes} bytes and {self._queued_fds} descriptors unread"
            )
        ours: list[int] = []
        try:
            for fd in fds:
                ours.append(os.dup(fd))
        except OSError as error:
            _close_own(ours)
            raise CapacityError(f"cannot duplicate descriptor {fd}: {error.strerror}") from error
        self._queued_fds += len(ours)
        for packet in packets:
            self._queue.append((packet, ours))
            self._queued_bytes += len(packet)
            ours = []
        return tag

    def flush(self) -> bool:
        """Send what the kernel takes now; True if all is sent. PeerError for a closed peer."""
        while self._queue:
            packet, fds = self._queue[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            try:
                self._socket.sendmsg([packet], rights, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return False
            except OSError as error:
                kind = PeerGoneError if error.errno in GONE else PeerError
                raise kind(f"cannot send to the peer: {error.strerror}") from error
            self._queue.popleft()
            self._queued_bytes -= len(packet)
            self._queued_fds -= len(fds)
            _close_own(fds)
        return True

    def recv_ready(self) -> list[Received] | Literal[Eof.EOF]:
        """Return the messages that have arrived, in order; after the last, EOF if the peer closed.

        Reads at most MAX_PACKETS_AT_ONCE packets, so that one peer cannot hold up the others; the
        rest keeps fileno() readable. Raises PeerError as soon as the peer breaks a rule, and
        CapacityError if this process had no room for received descriptors.
        """
        messages = list(self._taken)
        self._taken.clear()
        try:
            for _ in range(MAX_PACKETS_AT_ONCE):
                got = self._receive()
                if got is EOF:
                    return messages or EOF
                if got is None:
                    break
                messages += got
        except CowshedError:
            for message in messages:
                message.close_fds()
            raise
        return messages

    def _receive(self) -> list[Received] | Literal[Eof.EOF] | None:
        """Read one packet and return the 0 or 1 messages it ends; None if there is no packet."""
        packet = _packet_of_thread()
        try:
            length, ancillary, flags, _ = self._socket.recvmsg_into(
                [packet], socket.CMSG_SPACE(SCM_MAX_FDS * _FD_BYTES), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno == errno.ECONNRESET and not self._was_reset:
                # The peer closed with data of ours unread; what it sent before can still be read.
                self._was_reset = True
                return self._receive()
            kind = PeerGoneError if error.errno in GONE else PeerError
            raise kind(f"cannot receive from the peer: {error.strerror}") from error
        nr_fds = self._take_fds(ancillary)
        try:
            if flags & socket.MSG_TRUNC:
                raise PeerError(f"peer sent a packet of more than {MAX_PACKET_BYTES} bytes")
            if nr_fds > MAX_FDS:
                raise PeerError(f"peer sent more than {MAX_FDS} descriptors")
            if flags & socket.MSG_CTRUNC:  # this process is at its limit of open files
                raise CapacityError(no_room(errno.EMFILE))
            if nr_fds and is_full():
                raise PeerError("descriptors that peers sent wait to be closed: no more are taken")
            if length == 0:
                # EOF, or an empty packet, which looks the same and which no cowshed peer sends.
                if self._decoder.unfinished or nr_fds:
                    raise PeerError("peer closed the connection in the middle of a message")
                if self._was_reset:
                    raise PeerGoneError("peer closed the connection without reading all we sent")
                return EOF
            messages = self._decoder.feed(packet[:length], nr_fds)
        except CowshedError:
            close_foreign(self._arrived)
            raise
        if not messages:
            return []
        fds, self._arrived = self._arrived, []
        return [Received(one.tag, one.body, one.nr_fds, fds) for one in messages]

    def _take_fds(self, ancillary: list[tuple[int, int, bytes]]) -> int:
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % _FD_BYTES])
        self._arrived += fds
        return len(fds)


_of_thread = threading.local()


def _packet_of_thread() -> memoryview:
    """Return this thread's packet buffer; one a connection would cost gigabytes in a flood."""
    if not hasattr(_of_thread, "packet"):
        _of_thread.packet = memoryview(bytearray(MAX_PACKET_BYTES))
    packet: memoryview = _of_thread.packet
    return packet


def _close_own(fds: list[int]) -> None:
    while fds:
        with contextlib.suppress(OSError):
            os.close(fds.pop())
