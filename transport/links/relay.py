# SPDX-License-Identifier: Apache-2.0
"""A thread that carries a TLS connection to a plain socket, so that its server needs no TLS.

    network --ciphertext--> session --plaintext--> socketpair --> the owner of `inner`

It carries bytes in large pieces and knows nothing of requests. Each direction buffers at most one
piece: the relay reads from one side only when the other has taken the previous piece, so a slow
reader slows its writer and costs no memory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

from cowshed.cache.errors import PeerError

__all__ = ["CipherSession", "Relay"]

_PIECE_BYTES: Final = 256 << 10
# How long a peer that reads nothing may keep the relay once the plain side has ended.
_LINGER_SECONDS: Final = 10.0


class CipherSession(Protocol):
    """One end of TLS without a socket; transport/links/tls.py has it."""

    ready: bool
    ended: bool

    @property
    def outgoing(self) -> bytearray:
        """The bytes to be sent; the sender must delete from the front what it sent."""

    def feed(self, ciphertext: bytes | memoryview) -> bytes:
        """Take received bytes and return the plaintext."""

    def send(self, plaintext: bytes | memoryview) -> None:
        """Append plaintext, encrypted, to outgoing; only once ready."""

    def close(self) -> None:
        """Append the closing alert to outgoing."""


class Relay:
    """Carries between sock, which it owns, and `inner`, a plain socket that the caller owns.

    on_ready is called after the TLS handshake; on_end once, with the reason, when everything except
    `inner` is closed. Both are called in the relay's thread. A handshake that is not done within
    handshake_seconds ends the relay.
    """

    def __init__(
        self,
        sock: socket.socket,
        session: CipherSession,
        *,
        handshake_seconds: float,
        on_ready: Callable[[], None] = lambda: None,
        on_end: Callable[[str], None] = lambda _: None,
        came_before: bytes = b"",
    ) -> None:
        """Start carrying; came_before is plaintext that session has returned already.

        Raises OSError, and closes sock, if there is no descriptor or no thread left.
        """
        try:
            self.inner, self._plain = socket.socketpair()
        except OSError:
            sock.close()
            raise
        for end in (self._plain, sock):
            end.setblocking(False)
        self._sock = sock
        self._session = session
        self._to_plain = memoryview(came_before)
        self._deadline: float | None = time.monotonic() + handshake_seconds
        self._on_ready = on_ready
        self._on_end = on_end
        self._was_ready = False
        self._peer_ended = False
        self._plain_ended = False
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # at the limit of threads
            for end in (self._sock, self._plain, self.inner):
                end.close()
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error

    def stop(self) -> None:
        """Shut the connection down; the thread ends soon. From any thread, also after the end."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self._plain.shutdown(socket.SHUT_RDWR)

    def join(self) -> None:
        """Wait for the thread to end."""
        self._thread.join()

    def _run(self) -> None:
        why = ""
        try:
            self._carry()
        except PeerError as error:
            why = str(error)
            with contextlib.suppress(OSError):
                self._sock.send(self._session.outgoing)  # the alert that says why
        except OSError as error:
            why = error.strerror or str(error)
        finally:
            self._sock.close()
            self._plain.close()
            self._on_end(why)

    def _carry(self) -> None:
        poll = select.poll()
        while True:
            self._look_ready()
            network, plain = self._wanted()
            if not network and not plain:
                return
            for sock, events in ((self._sock, network), (self._plain, plain)):
                # A socket registered without events would still report a hang-up, in a busy loop.
                if events:
                    poll.register(sock, events)
                else:
                    with contextlib.suppress(KeyError):
                        poll.unregister(sock)
            ready = dict(poll.poll(self._left_ms()))
            if not ready and self._left_ms() == 0:
                raise PeerError("the TLS handshake or close timed out")
            if ready.get(self._sock.fileno(), 0):
                self._serve_network(network)
            if ready.get(self._plain.fileno(), 0):
                self._serve_plain(plain)

    def _wanted(self) -> tuple[int, int]:
        """Return the events to wait for; none on either side when everything is carried."""
        unsent = bool(self._session.outgoing)
        network = select.POLLOUT if unsent else 0
        if not self._to_plain and not self._peer_ended:
            network |= 0 if self._plain_ended else select.POLLIN
        plain = 0 if self._plain_ended or not self._to_plain else select.POLLOUT
        if self._session.ready and not unsent and not self._plain_ended:
            plain |= select.POLLIN
        return network, plain

    def _left_ms(self) -> int | None:
        if self._deadline is None:
            return None
        return max(0, int((self._deadline - time.monotonic()) * 1000))

    def _look_ready(self) -> None:
        if self._session.ready and not self._was_ready:
            self._was_ready = True
            self._deadline = None
            self._on_ready()

    def _serve_network(self, wanted: int) -> None:
        if wanted & select.POLLOUT:
            try:
                nr_sent = self._sock.send(self._session.outgoing)
            except BlockingIOError:
                nr_sent = 0
            except (BrokenPipeError, ConnectionResetError):
                # The peer reads no more, which is no error: what it sent before must still be read.
                nr_sent = len(self._session.outgoing)
            del self._session.outgoing[:nr_sent]
        if wanted & select.POLLIN:
            with contextlib.suppress(BlockingIOError):
                arrived = self._sock.recv(_PIECE_BYTES)
                if arrived:
                    self._to_plain = memoryview(self._session.feed(arrived))
                if not arrived or self._session.ended:
                    if not self._session.ready:
                        raise PeerError("the peer went away during the TLS handshake")
                    self._peer_ended = True
                    self._pass_end_on()

    def _serve_plain(self, wanted: int) -> None:
        if wanted & select.POLLOUT:
            try:
                nr_sent = self._plain.send(self._to_plain)
            except BlockingIOError:
                nr_sent = 0
            except BrokenPipeError:
                nr_sent = len(self._to_plain)  # inner reads no more, but may have replies to send
            self._to_plain = self._to_plain[nr_sent:]
            self._pass_end_on()
        if wanted & select.POLLIN:
            with contextlib.suppress(BlockingIOError):
                data = self._plain.recv(_PIECE_BYTES)
                if data:
                    self._session.send(data)
                else:
                    self._plain_ended = True
                    self._to_plain = memoryview(b"")
                    self._session.close()
                    self._deadline = time.monotonic() + _LINGER_SECONDS

    def _pass_end_on(self) -> None:
        """Pass the peer's end of stream on to the plain side, which may still send replies."""
        if self._peer_ended and not self._to_plain:
            with contextlib.suppress(OSError):
                self._plain.shutdown(socket.SHUT_WR)
