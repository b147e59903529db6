# SPDX-License-Identifier: Apache-2.0
"""The NBD server, at RUN_DIR/nbd.sock and perhaps HOST:PORT: a client from accept to its end.

    accept --admitted--> NbdSession (handshake, in the loop) --chosen--> C core's threads --> ended

A client that breaks a rule, stalls in its handshake or finds no place loses its connection; others
are not affected.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from cowshed.cache import Image
from cowshed.cache.errors import CowshedError
from cowshed.service.frontends.frontend_server import FrontendServer
from cowshed.service.frontends.nbd.exports import EnteredExport, NbdDirectory
from cowshed.service.frontends.nbd.peers import NbdPeer, listen_path, listen_tcp, peer_of, tune
from cowshed.service.frontends.nbd.session import NbdSession
from cowshed.service.host import Host
from cowshed.service.overlays.entrance import Entering, Entrance
from cowshed.service.overlays.overlays import OverlayGuest
from cowshed.service.runtime.logs import EventLog
from cowshed.service.runtime.loop import READ
from cowshed.service.runtime.test_points import reach
from cowshed.service.settings.tls_context import make_context
from cowshed.service.supervise.unserved_listeners import UnservedListeners
from cowshed.transport.links.acceptor import NR_SPARE, Acceptor
from cowshed.transport.links.relay import Relay
from cowshed.transport.nbd.negotiation import MAX_PAYLOAD_BYTES, Chosen
from cowshed.transport.nbd.serving import Ended, NbdCounters, NbdEnd, NbdExport, NbdServer

__all__ = ["NBD_SOCKET_NAME", "NbdService"]

_log = EventLog("cowshed.nbd")

NBD_SOCKET_NAME: Final = "nbd.sock"
_MAX_THREADS: Final = 8
# A plain connection is one socket; with TLS, two ends of a pair come with it.
_FDS_PLAIN: Final = 1
_FDS_TLS: Final = 3
_REASONS: Final = {NbdEnd.PROTOCOL: "protocol", NbdEnd.MEMORY: "limit"}


@dataclass
class _Client:
    """A connection that the core's threads serve."""

    peer: NbdPeer
    export: EnteredExport
    nr_files: int
    relay: Relay | None


class NbdService(FrontendServer[NbdSession]):
    """Listens from construction until close(); all in the loop.

    unserved retries listeners and certificates that cannot be opened. Until the certificates can,
    tls is None: local clients are offered no TLS, and HOST:PORT is not served.

    Invariant: each connection is in _sessions or in _clients, and admitted once.
    """

    def __init__(
        self, host: Host, core: NbdServer, entrance: Entrance, unserved: UnservedListeners
    ) -> None:
        super().__init__(host, _log)
        config, listeners, loop = host.config, host.listeners, host.loop
        self.tls: ssl.SSLContext | None = None
        self._nr_files: Final = _FDS_PLAIN if config.tls is None else _FDS_TLS
        self._config = config
        self._store = host.store
        self._access = host.access
        self._overlays = host.overlays
        self._entrance = entrance
        self._clients: dict[int, _Client] = {}
        self._others: dict[int, Callable[[Ended], None]] = {}
        self._images: dict[Image, NbdExport] = {}
        self._acceptor: Final = Acceptor()
        self._path: Final = config.run_dir / NBD_SOCKET_NAME
        self._core: Final = core
        self._listeners: list[socket.socket] = []
        self._listen(listeners.open("nbd", lambda: listen_path(self._path), self._path))
        if config.tls is not None:
            address = f"nbds+unix:///?socket={self._path}"
            unserved.serve(address, self.load_tls, self._offer_tls, kept_as=address)
        if (endpoint := config.nbd) is not None:
            kept_as = f"nbd/{endpoint}"

            def prepare() -> tuple[socket.socket, ssl.SSLContext | None]:
                tls = self.load_tls()
                return listeners.open(kept_as, lambda: listen_tcp(endpoint)), tls

            scheme = "nbd" if config.tls is None else "nbds"
            unserved.serve(f"{scheme}://{endpoint}", prepare, self._listen_tcp, kept_as)
        loop.watch(self._core.event_fd, READ, self._on_ended)

    def load_tls(self) -> ssl.SSLContext | None:
        """Return the context of [tls], read anew unless one is in use; None if there is no [tls].

        UsageError, one line, if its files cannot be used. For any thread; may wait for a disk.
        """
        return self.tls or (make_context(self._config.tls) if self._config.tls else None)

    def _offer_tls(self, tls: ssl.SSLContext | None) -> None:
        self.tls = self.tls or tls

    def _listen(self, listener: socket.socket) -> None:
        self._listeners.append(listener)
        self._loop.watch(listener.fileno(), READ, lambda *_: self._on_peer(listener))

    def _listen_tcp(self, prepared: tuple[socket.socket, ssl.SSLContext | None]) -> None:
        listener, tls = prepared
        self._offer_tls(tls)
        self._listen(listener)
        host, port = listener.getsockname()[:2]
        _log.notice("nbd", url=f"{'nbd' if self.tls is None else 'nbds'}://{host}:{port}")
        if self.tls is None and not host.startswith(("127.", "::1")):
            _log.warning(
                "nbd-open",
                "NBD without TLS lets anybody who reaches it read every image of the default "
                "domain: configure [tls], or listen at a loopback address",
                address=f"{host}:{port}",
            )

    def counters(self) -> Iterator[tuple[Image, NbdCounters]]:
        """Yield the counters of each image: of its own export and those of its overlays."""
        for image in self._store:
            yield image, self._core.counters(image)

    def close(self) -> None:
        """End every connection and release everything; the loop has stopped."""
        for listener in self._listeners:
            listener.close()
        with contextlib.suppress(OSError):
            self._path.unlink()
        for session in list(self._sessions.values()):
            session.close()
        self._core.drain()
        for ended in self._core.take_ended():
            self._end_client(ended)
        for export in self._images.values():
            export.close()
        self._acceptor.close()

    def nr_unfinished(self) -> int:
        """The number of connections in a handshake."""
        return sum(not session.refusal for session in self._sessions.values())

    # Accepting.

    def _on_peer(self, listener: socket.socket) -> None:
        if (taken := self._acceptor.accept_any(listener)) is not None:
            reach("NBD_CAME")
            tune(taken[0])
            self._admit(taken[0], taken[2])

    def _admit(self, sock: socket.socket, errno: int) -> None:
        try:
            peer = peer_of(sock)
        except OSError:
            sock.close()
            return
        if refusal := self._refusal(errno, peer.counted_as, self._nr_files):
            self._note_turned_away(refusal, peer.who)
            turned_away = [each for each in self._sessions.values() if each.refusal]
            if len(turned_away) >= NR_SPARE - 1:
                self.over(min(turned_away, key=lambda each: each.deadline), "", "")
        session = NbdSession(sock, peer, self, self._loop, refusal)
        self._sessions[id(session)] = session
        session.begin()

    # SessionOwner.

    def directory(self, peer: NbdPeer, client: Entering) -> NbdDirectory:
        """The exports that a client may see."""
        return NbdDirectory(self._store, self._access, self._overlays, self._entrance, peer, client)

    def named(self, peer: NbdPeer, names: list[str]) -> NbdPeer:
        """Return the peer with the name in its certificate; UsageError if the names conflict."""
        return peer.named(self._access.domains.client_name(names))

    def chosen(self, session: NbdSession, chosen: Chosen) -> None:
        """Give the connection to the core's threads."""
        export = chosen.export
        assert isinstance(export, EnteredExport)
        assert export.image is not None
        try:
            connection_no = self._core.attach(
                self._export(export),
                session.sock.fileno(),
                structured=chosen.negotiated.structured,
                extended=chosen.negotiated.extended,
                read_only=chosen.negotiated.read_only,
                trim_zeroes=self._config.trims_to_zeros(export.image.domain, export.image.name),
                context_ids=chosen.negotiated.context_ids,
                max_payload_bytes=MAX_PAYLOAD_BYTES,
            )
        except CowshedError as error:
            self._let_go(export)
            self.over(session, "limit", str(error))
            return
        session.sock.detach()
        del self._sessions[id(session)]
        self._clients[connection_no] = _Client(session.peer, export, self._nr_files, session.relay)
        _log.info("nbd-attached", export=export.name, **session.who)

    def over(self, session: NbdSession, reason: str, why: str) -> None:
        """The session ended before data flowed."""
        if reason:
            self._drop(session, reason, why)
        else:
            self._end(session)

    def _drop(self, session: NbdSession, reason: str, why: str) -> None:
        if session.refusal and reason == "handshake":
            self._end(session)  # counted when it was turned away
        else:
            super()._drop(session, reason, why)

    def _end(self, session: NbdSession) -> None:
        self._sessions.pop(id(session), None)
        session.close()
        if session.refusal:
            self._acceptor.refill()
        else:
            self._admission.leave(session.peer.counted_as, self._nr_files)

    def _export(self, held: EnteredExport) -> NbdExport:
        if held.overlay is not None:
            return held.overlay.export
        assert held.image is not None
        if held.image not in self._images:
            self._images[held.image] = NbdExport(self._core, held.image)
        return self._images[held.image]

    def _let_go(self, export: EnteredExport) -> None:
        if export.overlay is not None:
            self._overlays.leave(export.overlay)

    # Connections that another server accepted, and that speak NBD from here on.

    def serve(
        self, export: NbdExport, sock: socket.socket, on_ended: Callable[[Ended], None]
    ) -> int:
        """Give sock to the core's threads; return the connection's number.

        on_ended is called once, in the loop or by close(). CapacityError leaves sock the caller's.
        """
        number = self._core.attach(export, sock.fileno(), structured=True)
        sock.detach()
        self._others[number] = on_ended
        return number

    def disconnect(self, guest: OverlayGuest) -> None:
        """Begin to end all of an overlay's clients that this server accepted."""
        for number, client in list(self._clients.items()):
            if client.export.overlay is guest:
                self._core.detach(number)

    def detach(self, connection_no: int) -> None:
        """Begin to end a connection."""
        self._core.detach(connection_no)

    # Ending.

    def look_ended(self) -> None:
        """Release the connections that have ended by now."""
        self._on_ended()

    def _on_ended(self, *_: int) -> None:
        for ended in self._core.take_ended():
            self._end_client(ended)

    def _end_client(self, ended: Ended) -> None:
        if (on_ended := self._others.pop(ended.connection_no, None)) is not None:
            on_ended(ended)
            return
        client = self._clients.pop(ended.connection_no)
        peer = client.peer
        self._admission.leave(peer.counted_as, client.nr_files)
        self._let_go(client.export)
        if reason := _REASONS.get(ended.reason):
            why = {
                "protocol": "it broke the NBD protocol",
                "limit": "there was no memory for its requests",
            }[reason]
            self._note_dropped(reason, why, {"export": client.export.name, **peer.who})
        else:
            how = os.strerror(ended.err) if ended.err else ended.reason.name.lower()
            _log.info("nbd-detached", export=client.export.name, end=how, **peer.who)

    def _look_after(self) -> None:
        self._on_ended()  # even if the core's event was missed
        super()._look_after()
