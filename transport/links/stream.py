# SPDX-License-Identifier: Apache-2.0
"""Messages over one connected stream socket: tcp, tls, vsock.

The same interface as a Connection over a unix socket, with two differences: no descriptors travel,
and queued messages are joined: one system call for a batch and, on tls, full records.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

from cowshed.cache.errors import PeerError, PeerGoneError, UsageError
from cowshed.transport.links.connection import EOF, GONE, Connection, Eof, Peer, Received
from cowshed.transport.messages.protocol import MAX_REPLY_BYTES
from cowshed.transport.messages.stream_decoder import StreamDecoder

if TYPE_CHECKING:
    from cowshed.transport.links.tls import TlsSession

__all__ = ["StreamConnection"]

_READ_BYTES: Final = 64 << 10
_MAX_PIECES: Final = 64


class StreamConnection(Connection):
    """One connected stream socket, owned; on tls, sending and receiving advance the handshake.

    _sent bytes of the first packet in _queue are sent already.
    """

    carries_descriptors = False

    def __init__(
        self,
        sock: socket.socket,
        where: str,
        tls: TlsSession | None = None,
        receive_limit_bytes: int = MAX_REPLY_BYTES,
        send_limit_bytes: int = MAX_REPLY_BYTES,
    ) -> None:
        super().__init__(sock, receive_limit_bytes, send_limit_bytes)
        self.where: Final = where
        self._stream = StreamDecoder(receive_limit_bytes)
        self._tls = tls
        self._sent = 0
        self._ended = False
        self._peer = Peer(0, -1, -1, None)

    def limit(self, receive_bytes: int, send_bytes: int) -> None:
        """Limit the size of messages from now on; to be called between messages."""
        self._stream = StreamDecoder(receive_bytes)
        self._send_limit_bytes = send_bytes

    @property
    def identity(self) -> str:
        """The name in the peer's certificate; "" without tls, or before its handshake is done."""
        return self._tls.peer_name if self._tls else ""

    @property
    def identities(self) -> list[str]:
        """Every name in the peer's certificate, identity first."""
        return self._tls.peer_names if self._tls else []

    @property
    def peer_name(self) -> str:
        """The peer as text for a log."""
        return f"{self.identity} ({self.where})" if self.identity else self.where

    @property
    def ready(self) -> bool:
        """Whether the tls handshake is done, if there is one."""
        return self._tls is None or self._tls.ready

    @property
    def wants_write(self) -> bool:
        """Whether flush has something to send now."""
        if self._tls is not None:
            return bool(self._tls.outgoing) or (self._tls.ready and bool(self._queue))
        return bool(self._queue)

    def queue(
        self, body: Mapping[str, Any], fds: Sequence[int] = (), tag: int | None = None
    ) -> int:
        """As Connection.queue; UsageError for descriptors, which a stream cannot carry."""
        if fds:
            raise UsageError(f"{self.where} carries no descriptors; use unix:// for those")
        return super().queue(body, (), tag)

    def flush(self) -> bool:
        """Send what the kernel takes now; True if all is sent. PeerError for a closed peer."""
        try:
            return self._flush_plain() if self._tls is None else self._flush_tls(self._tls)
        except BlockingIOError:
            return False
        except OSError as error:
            kind = PeerGoneError if error.errno in GONE else PeerError
            raise kind(f"cannot send to the peer: {error.strerror}") from error

    def _flush_plain(self) -> bool:
        while self._queue:
            pieces = [packet for packet, _ in list(self._queue)[:_MAX_PIECES]]
            pieces[0] = pieces[0][self._sent :]
            sent = self._socket.sendmsg(pieces, (), socket.MSG_NOSIGNAL)
            self._sent += sent
            while self._queue and self._sent >= len(self._queue[0][0]):
                self._sent -= len(self._pop())
        return True

    def _flush_tls(self, tls: TlsSession) -> bool:
        while True:
            outgoing = tls.outgoing
            while outgoing:
                del outgoing[: self._socket.send(outgoing, socket.MSG_NOSIGNAL)]
            if not self._queue or not tls.ready:
                return not self._queue
            batch = b"".join(self._pop() for _ in range(min(len(self._queue), _MAX_PIECES)))
            tls.send(batch)

    def _pop(self) -> bytes:
        packet, _ = self._queue.popleft()
        self._queued_bytes -= len(packet)
        return packet

    def _wait(self, event: int, deadline: float | None) -> bool:
        """Wait for event; during a TLS handshake, wait for either direction and advance it."""
        if self._tls is not None and not self._tls.ready:
            self.flush()
            event = select.POLLIN | (select.POLLOUT if self._tls.outgoing else 0)
            if super()._wait(event, deadline):
                self._shake()
                return True
            return False
        return super()._wait(event, deadline)

    def _shake(self) -> None:
        """Receive handshake bytes; messages that follow it at once go to _taken."""
        assert self._tls is not None
        if (got := self._receive()) is EOF:
            raise PeerError("peer closed the connection in the middle of the tls handshake")
        if got:
            self._taken += got

    def _receive(self) -> list[Received] | Literal[Eof.EOF] | None:
        if self._ended:
            return EOF
        try:
            arrived = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            kind = PeerGoneError if error.errno in GONE else PeerError
            raise kind(f"cannot receive from the peer: {error.strerror}") from error
        ended = not arrived
        if self._tls is not None and arrived:
            try:
                arrived = self._tls.feed(arrived)
            finally:
                self._pass_on_tls()
            ended = self._tls.ended
        messages = self._stream.feed(arrived)
        if ended:
            self._ended = True
            if self._stream.unfinished:
                raise PeerError("peer closed the connection in the middle of a message")
            if not messages:
                return EOF
        return [Received(one.tag, one.body, one.nr_fds, []) for one in messages]

    def _pass_on_tls(self) -> None:
        """Send what the session produces by itself: handshake, alerts, key updates."""
        assert self._tls is not None
        outgoing = self._tls.outgoing
        try:
            while outgoing:
                del outgoing[: self._socket.send(outgoing, socket.MSG_NOSIGNAL)]
        except OSError:
            pass  # no room now: flush() sends the rest; or the peer is gone: the next call fails

    def take_stream(self) -> tuple[socket.socket, TlsSession | None]:
        """Hand over the socket and its TLS session, for another protocol from here on.

        The queue must be empty. Raises PeerError if the peer sent more before the last reply.
        """
        assert not self._queue
        if self._stream.unfinished or self._taken:
            raise PeerError("peer sent more before it was answered")
        return socket.socket(fileno=self._socket.detach()), self._tls
