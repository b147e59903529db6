# SPDX-License-Identifier: Apache-2.0
"""One NBD client until data flows: its socket and its handshake, in the daemon's loop.

A session reads no more than the handshake needs next, and nothing while it has something to send.
So a client has at most one option in flight, and no byte of the data phase is read here. When the
client requests TLS, a relay takes over the socket, and the handshake continues in plain text on the
relay's inner end.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Callable, Iterable
from typing import Final, Protocol

from cowshed.cache.errors import CowshedError, PeerError
from cowshed.service.frontends.nbd.peers import NbdPeer
from cowshed.service.guests.turned_away import what_failed
from cowshed.service.overlays.entrance import Entering
from cowshed.service.runtime.loop import READ, WRITE, Loop
from cowshed.transport.links.relay import Relay
from cowshed.transport.links.tls import TlsSession
from cowshed.transport.nbd.negotiation import (
    Aborted,
    Chosen,
    Directory,
    Export,
    ExportRefused,
    NbdHandshake,
    WantsExport,
    WantsTls,
)
from cowshed.transport.nbd.wire import Reply

__all__ = ["NbdSession", "SessionOwner"]

_HANDSHAKE_SECONDS: Final = 30.0
_REFUSAL_SECONDS: Final = 5.0


class _NoExports:
    """The directory of a client that there is no room for: every request is refused with why."""

    def __init__(self, why: str) -> None:
        self._why = why

    def exports(self) -> Iterable[Export]:
        """Refuse."""
        raise ExportRefused(Reply.ERR_POLICY, self._why)

    def find(self, _: str) -> Export:
        """Refuse."""
        raise ExportRefused(Reply.ERR_POLICY, self._why)

    def enter(self, _: str) -> Export:
        """Refuse."""
        raise ExportRefused(Reply.ERR_POLICY, self._why)


class SessionOwner(Protocol):
    """The part of the server that a session uses."""

    tls: ssl.SSLContext | None

    def directory(self, peer: NbdPeer, client: Entering) -> Directory:
        """The exports that a client may see."""

    def named(self, peer: NbdPeer, names: list[str]) -> NbdPeer:
        """Return the peer with the name in its certificate; UsageError if the names conflict."""

    def chosen(self, session: NbdSession, chosen: Chosen) -> None:
        """Begin the data phase on session.sock, which the session no longer watches."""

    def over(self, session: NbdSession, reason: str, why: str) -> None:
        """The session ended before data flowed; reason is "" if nothing was wrong."""


class NbdSession:
    """Owns its socket until the owner's chosen() or over() is called; then the owner does.

    refusal, if not "", is why every export is refused to this client.
    """

    def __init__(
        self,
        sock: socket.socket,
        peer: NbdPeer,
        owner: SessionOwner,
        loop: Loop,
        refusal: str = "",
    ) -> None:
        self.refusal: Final = refusal
        self.sock = sock
        self.peer = peer
        self.relay: Relay | None = None
        seconds = _REFUSAL_SECONDS if refusal else _HANDSHAKE_SECONDS
        self.deadline: Final = time.monotonic() + seconds
        self._owner = owner
        self._loop = loop
        self._watched = False
        self._entering: Final = Entering(lambda: self._attempt(self._on_entered))
        self._handshake = NbdHandshake(
            self._directory(),
            tls_offered=owner.tls is not None,
            tls_required=owner.tls is not None and not peer.is_local,
        )
        self._unsent = self._handshake.greeting()

    def _directory(self) -> Directory:
        return (
            _NoExports(self.refusal)
            if self.refusal
            else self._owner.directory(self.peer, self._entering)
        )

    @property
    def who(self) -> dict[str, object]:
        """The client."""
        return self.peer.who

    def begin(self) -> None:
        """Send the greeting, and continue as the client answers."""
        self._watch(READ)
        self._attempt(self._go_on)

    def close(self) -> None:
        """Release the client and the socket, in any state of the handshake."""
        self._entering.give_up()
        self._forget()
        self.sock.close()
        # Once TLS is on, closing the plain end is enough, and the relay still sends the last reply.
        if self.relay is not None and not self._handshake.secure:
            self.relay.stop()

    def _watch(self, events: int) -> None:
        if not self._watched:
            self._loop.watch(self.sock.fileno(), events, self._on_ready)
            self._watched = True
        else:
            self._loop.change(self.sock.fileno(), events)

    def _forget(self) -> None:
        if self._watched:
            self._loop.forget(self.sock.fileno())
            self._watched = False

    def _on_ready(self, _: int, events: int) -> None:
        self._attempt(self._receive if events & READ and not self._unsent else self._go_on)

    def _attempt(self, step: Callable[[], None]) -> None:
        try:
            step()
        except PeerError as error:
            self._owner.over(self, "protocol", str(error))
        except OSError as error:
            self._owner.over(self, "protocol", f"its socket failed: {error.strerror}")

    def _receive(self) -> None:
        if isinstance(self._handshake.outcome, WantsExport):
            self._look_gone()
            return
        try:
            arrived = self.sock.recv(self._handshake.wanted_bytes)
        except BlockingIOError:
            return
        if not arrived:
            self._owner.over(self, "", "it went away during the handshake")
            return
        self._unsent = self._handshake.feed(arrived)
        self._go_on()

    def _look_gone(self) -> None:
        """End the session if the client left while it waits for its overlay.

        Bytes that it sent are read after the overlay is there.
        """
        with contextlib.suppress(BlockingIOError):
            if self.sock.recv(1, socket.MSG_PEEK):
                self._forget()
            else:
                self._owner.over(self, "", "it went away during the handshake")

    def _on_entered(self) -> None:
        self._unsent += self._handshake.entered()
        self._go_on()

    def _go_on(self) -> None:
        """Send what is unsent; once all is sent, act on the handshake's outcome."""
        if self._unsent:
            with contextlib.suppress(BlockingIOError):
                self._unsent = self._unsent[self.sock.send(self._unsent) :]
            if self._unsent:
                self._watch(WRITE)
                return
        match self._handshake.outcome:
            case None | WantsExport():
                self._watch(READ)
            case WantsTls():
                self._secure()
            case Aborted():
                self._owner.over(self, "", "it aborted the handshake")
            case Chosen() as chosen:
                self._forget()
                self._owner.chosen(self, chosen)

    # TLS.

    def _secure(self) -> None:
        assert self._owner.tls is not None
        self._forget()
        tls = TlsSession(self._owner.tls, server_side=True)
        try:
            self.relay = Relay(
                self.sock,
                tls,
                handshake_seconds=max(0.0, self.deadline - time.monotonic()),
                on_ready=lambda: self._loop.call(lambda: self._on_secured(tls)),
                on_end=lambda why: self._loop.call(lambda: self._on_unsecured(tls, why)),
            )
        except OSError as error:
            self._owner.over(self, "limit", what_failed(error)[1])
            return
        self.sock = self.relay.inner
        self.sock.setblocking(False)

    def _on_secured(self, tls: TlsSession) -> None:
        if self.sock.fileno() < 0:
            return  # closed meanwhile
        try:
            self.peer = self._owner.named(self.peer, tls.peer_names)
        except CowshedError as error:
            self._owner.over(self, "handshake", str(error))
            return
        self._handshake.secured(self._directory())
        self._watch(READ)

    def _on_unsecured(self, tls: TlsSession, why: str) -> None:
        if not tls.ready and self.sock.fileno() >= 0:
            self._owner.over(self, "handshake", why)
