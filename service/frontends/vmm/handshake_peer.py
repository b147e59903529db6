# SPDX-License-Identifier: Apache-2.0
"""One connection to an image's socket: requests and descriptors in, replies out, non-blocking."""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
from collections import deque
from typing import Final, NamedTuple

from cowshed.cache import CapacityError, PeerError
from cowshed.transport.links.acceptor import NO_ROOM
from cowshed.transport.links.foreign_fds import SCM_MAX_FDS, close_foreign, is_full
from cowshed.transport.links.no_room import no_room
from cowshed.transport.vmm.handshakes import HandshakeDecoder, Request, VmmHandshake

__all__ = ["HandshakePeer", "Incoming"]

_UCRED: Final = struct.Struct("3i")
_SO_PEERPIDFD: Final = 77
# Small reads, so that a flood of tiny messages does not occupy the loop for long.
_PIECE_BYTES: Final = 4096
_MAX_FDS: Final = 32
# Unread replies; a peer that leaves more is dropped.
_MAX_QUEUED: Final = 64


class Incoming(NamedTuple):
    """A request, and a handshake's descriptor (else -1), owned by the receiver."""

    request: Request
    fd: int


class HandshakePeer:
    """A connected stream socket, owned: close() closes it, descriptors that arrived and were not
    taken, and record, a descriptor with the same lifetime (or -1).

    pid, uid and gid are the kernel's, from when the peer connected; pidfd is None if the kernel
    gives none, and no_room is the errno if no descriptor was left for it. Complete messages are
    peeked at and stay in the socket until take_seen(), so that a successor can still read them.

    Invariants: _arrived are the decoder's nr_fds descriptors; while _nr_seen, the bytes peeked at,
    is not 0, the decoder is between messages.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._decoder = HandshakeDecoder()
        self._arrived: list[int] = []
        self._nr_seen = 0
        self.record = -1
        self._queue: deque[tuple[bytes, list[int]]] = deque()
        packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        self.pid, self.uid, self.gid = _UCRED.unpack(packed)
        self.pidfd: int | None = None
        self.no_room = 0
        try:
            self.pidfd = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
        except OSError as error:  # else the kernel is older, or the peer is gone and reaped
            self.no_room = error.errno if error.errno in NO_ROOM else 0

    @property
    def is_busy(self) -> bool:
        """Whether a message is partly received or partly sent."""
        return self._decoder.unfinished or bool(self._queue)

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket and every descriptor held for it."""
        self._socket.close()
        close_foreign(self._arrived)
        self._queue.clear()
        self.close_record()
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None

    def close_record(self) -> None:
        """Close the record; the keeper must not hold the connection's group any more."""
        if self.record >= 0:
            os.close(self.record)
            self.record = -1

    def receive(self) -> list[Incoming] | None:
        """Return the requests that are there, a bounded number; None if the peer has closed.

        Raises PeerError for a peer that breaks a rule, CapacityError if descriptors were lost.
        """
        self.take_seen()
        seen = None if self._decoder.unfinished else self._look()
        if seen is not None:
            return seen
        try:
            piece, fds, is_cut = self._recv(_PIECE_BYTES)
        except BlockingIOError:
            return []
        except OSError as error:
            raise PeerError(f"cannot receive from the peer: {error.strerror}") from error
        self._arrived += fds
        if is_cut:  # no descriptor was left for one that was sent
            raise CapacityError(no_room(errno.EMFILE))
        if len(fds) > _MAX_FDS:
            raise PeerError(f"the peer sent more than {_MAX_FDS} descriptors")
        if fds and is_full():
            raise PeerError("descriptors that peers sent wait to be closed: no more are accepted")
        if not piece:
            if self._decoder.unfinished:
                raise PeerError("the peer closed the connection in the middle of a message")
            return None
        incoming = []
        for request in self._decoder.feed(piece, len(fds)):
            fd = self._arrived.pop(0) if isinstance(request, VmmHandshake) else -1
            incoming.append(Incoming(request, fd))
        return incoming

    def _look(self) -> list[Incoming] | None:
        """Peek at the socket; return its messages if they are complete and valid, else None."""
        fds: list[int] = []
        try:
            piece, fds, is_cut = self._recv(_PIECE_BYTES, socket.MSG_PEEK)
            decoder = HandshakeDecoder()
            is_bad = is_cut or len(fds) > _MAX_FDS or (bool(fds) and is_full())
            requests = [] if is_bad else decoder.feed(piece, len(fds))
            if not requests or decoder.unfinished:
                return None
            incoming = [
                Incoming(each, fds.pop(0) if isinstance(each, VmmHandshake) else -1)
                for each in requests
            ]
            self._nr_seen = len(piece)
            return incoming
        except (OSError, PeerError):  # reported when it is received
            return None
        finally:
            close_foreign(fds)

    def take_seen(self) -> None:
        """Remove from the socket what receive() peeked at: it is handled, or never will be."""
        while self._nr_seen:
            try:
                piece, fds, _ = self._recv(self._nr_seen)
            except OSError as error:
                raise PeerError(f"cannot receive from the peer: {error.strerror}") from error
            close_foreign(fds)
            self._nr_seen = self._nr_seen - len(piece) if piece else 0

    def _recv(self, nr_bytes: int, flags: int = 0) -> tuple[bytes, list[int], bool]:
        """Receive bytes; also return their descriptors, and whether some were lost."""
        piece, ancillary, got, _ = self._socket.recvmsg(
            nr_bytes, socket.CMSG_SPACE(SCM_MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC | flags
        )
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        return piece, list(fds), bool(got & socket.MSG_CTRUNC)

    def queue(self, text: bytes, fds: list[int] | None = None) -> None:
        """Queue a message; fds stay the caller's, and must stay open until it is sent.

        Raises PeerError if the peer leaves too many unread.
        """
        if len(self._queue) >= _MAX_QUEUED:
            raise PeerError(f"the peer leaves {len(self._queue)} messages unread")
        self._queue.append((text, fds or []))

    def flush(self) -> bool:
        """Send what can be sent now; return whether all is. PeerError if the peer has closed."""
        while self._queue:
            text, fds = self._queue[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            try:
                nr_sent = self._socket.sendmsg([text], rights, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return False
            except OSError as error:
                raise PeerError(f"cannot send to the peer: {error.strerror}") from error
            if nr_sent < len(text):
                self._queue[0] = (text[nr_sent:], [])
            else:
                self._queue.popleft()
        return True
