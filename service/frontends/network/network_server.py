# SPDX-License-Identifier: Apache-2.0
"""The server of guests over a network, at each --listen URI: a connection from accept to its end.

    accept --Admission--> NetworkSession (in the loop) --data--> the C core's threads --> ended

A guest whose connection breaks keeps its private pages: its state is "away" until it reconnects
with the same token. A guest that ends in order loses them, unless it asked to keep them. If a guest
reconnects while its old connection seems alive, the old one must end first: otherwise writes sent
on it could overtake those on the new one.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Final

from cowshed.accounting import QuotaPolicy
from cowshed.cache import CapacityError, CowshedError, Image, PeerError, UsageError
from cowshed.service.frontends.frontend_server import FrontendServer
from cowshed.service.frontends.nbd.server import NbdService
from cowshed.service.frontends.network.session import Entered, NetworkSession, address_of
from cowshed.service.guests.turned_away import TurnedAway, what_failed
from cowshed.service.host import Host
from cowshed.service.migration.handoff_target import HandoffTarget
from cowshed.service.migration.link import SocketLink
from cowshed.service.overlays.claims import Claim
from cowshed.service.overlays.entrance import Entering, Entrance
from cowshed.service.overlays.overlays import OverlayGuest
from cowshed.service.persist.listeners import Listeners
from cowshed.service.runtime.logs import EventLog
from cowshed.service.runtime.loop import READ, WRITE
from cowshed.service.runtime.test_points import reach
from cowshed.service.settings.domains import Identity
from cowshed.service.supervise.unserved_listeners import UnservedListeners
from cowshed.transport import EOF
from cowshed.transport.links.addresses import parse_stream_uri, scheme_of
from cowshed.transport.links.relay import Relay
from cowshed.transport.links.stream_ends import StreamListener, listen
from cowshed.transport.messages.fields import error_reply
from cowshed.transport.nbd.serving import Ended, NbdEnd

__all__ = ["NetworkServer"]

_log = EventLog("cowshed.network")

_FDS: Final = {"tcp": 1, "vsock": 1, "tls": 3}  # with TLS, two ends of a pair come with it


class NetworkServer(FrontendServer[NetworkSession]):
    """Listens from construction until close(); all in the loop.

    unserved retries listeners that cannot be opened; at a first start it raises UsageError.

    Invariant: each connection is in _sessions, or its number in _numbers, and admitted once.
    """

    def __init__(
        self,
        host: Host,
        entrance: Entrance,
        nbd: NbdService,
        handoffs: HandoffTarget,
        unserved: UnservedListeners,
    ) -> None:
        """handoffs receives guests from the other backends that the configuration allows."""
        super().__init__(host, _log)
        listeners = host.listeners
        self._store = host.store
        self._access = host.access
        self._overlays = host.overlays
        self._entrance = entrance
        self._nbd = nbd
        self._numbers: dict[OverlayGuest, int] = {}
        self._handoffs: Final = handoffs
        self._handoff_rules: Final = host.config.handoff_rules
        self._listeners: dict[int, StreamListener] = {}
        self._turned_away: dict[int, TurnedAway] = {}
        try:
            for uri in host.config.listen:
                kept_as = uri.partition("?")[0]
                prepare = functools.partial(_prepare, uri, kept_as, nbd, listeners)
                unserved.serve(kept_as, prepare, self._open, kept_as)
        except BaseException:
            self.close()
            raise

    def _open(self, listener: StreamListener) -> None:
        self._listeners[listener.fileno()] = listener
        self._turned_away[listener.fileno()] = TurnedAway(self._loop, listener.refill)
        self._loop.watch(listener.fileno(), READ, self._on_connect)
        _log.notice("listening", uri=listener.uri)
        if listener.scheme == "tcp" and not listener.is_local:
            _log.warning(
                "listening-open",
                "tcp without TLS lets anybody who reaches it read every image of the default "
                "domain: use tls://, or a loopback address",
                uri=listener.uri,
            )

    def close(self) -> None:
        """Stop listening and end all sessions; the C core ends connections in their data phase."""
        for fd, listener in self._listeners.items():
            self._loop.forget(fd)
            self._turned_away[fd].close()
            listener.close()
        self._listeners.clear()
        for session in list(self._sessions.values()):
            self._end(session)

    def nr_unfinished(self) -> int:
        """The number of connections in a handshake."""
        return len(self._sessions)

    # NetworkHost.

    def find_image(self, name: str, identity: Identity) -> Image:
        """Return the image of that name; UsageError naming those the guest may use."""
        return self._access.find(self._store, name, identity)

    def identity(self, names: list[str]) -> Identity:
        """Return the identity of a certificate's names; UsageError if they conflict."""
        return Identity(client_name=self._access.domains.client_name(names))

    def enter(
        self,
        client: Entering,
        image: Image,
        name: str,
        claim: Claim,
        quota_bytes: int | None,
        policy: QuotaPolicy | None,
    ) -> OverlayGuest:
        """Enter a guest's overlay as its only client; CapacityError if it has another."""
        # The guest's last connection may have just ended, which frees its name.
        self._nbd.look_ended()
        guest = self._entrance.enter(
            client, image, name, claim, quota_bytes=quota_bytes, policy=policy
        )
        if guest.nr_clients > 1:
            self._overlays.leave(guest)
            if guest in self._numbers:
                self._nbd.detach(self._numbers[guest])
                raise CapacityError(f"the old connection of guest {name!r} is being ended; retry")
            raise CapacityError(f"guest {name!r} is already connected; disconnect it first")
        return guest

    def check_pages(self, image: Image, name: str, overlay_id: str) -> None:
        """Raise CapacityError if the guest's private pages are not here; makes none."""
        guest = self._overlays.get(image.domain, name)
        if guest is None or guest.pages_id != overlay_id:
            raise CapacityError(
                f"the private pages of guest {name!r} are not here; ask the backend that sent it"
            )

    def overlay_id(self, guest: OverlayGuest) -> str:
        """Return the identifier of the guest's private pages."""
        return guest.pages_id

    def check_handoff(self, client_name: str | None, scheme: str) -> None:
        """Raise UsageError unless this peer may hand guests over to us."""
        if self._handoffs is None or not self._handoff_rules.allows(client_name, scheme):
            who = repr(client_name) if client_name else f"a backend connected by {scheme}"
            _log.warning("handoff-refused", f"handoffs from {who} are not taken here")
            raise UsageError(
                f"handoffs from {who} are not taken here; name its certificate in handoff_from, "
                "or, for tcp without TLS, serve with --accept-handoff"
            )

    def leave(self, entered: Entered, *, was_orderly: bool) -> None:
        """Leave a guest; discards its overlay if it ended in order and did not ask to keep it."""
        guest = entered.guest
        self._overlays.leave(guest)
        if was_orderly and not entered.keep and not guest.nr_clients:
            try:
                self._entrance.begin(
                    f"discard overlay {guest.label}", lambda: self._discard(guest.label)
                )
            except CowshedError as error:
                _log.warning("not-discarded", str(error), overlay=guest.label)

    def _discard(self, label: str) -> None:
        try:
            self._overlays.discard(label, guest_asked=True)
        except CowshedError as error:
            _log.warning("not-discarded", str(error), overlay=label)

    def disconnect(self, guest: OverlayGuest) -> None:
        """Begin to end a guest's connections, here and at the NBD server."""
        self._nbd.disconnect(guest)
        if guest in self._numbers:
            self._nbd.detach(self._numbers[guest])

    # Accepting.

    def _on_connect(self, listening_fd: int, _: int) -> None:
        listener = self._listeners[listening_fd]
        connection = listener.accept_any()
        if connection is None:
            return
        reach("NETWORK_CAME")
        who = address_of(connection)
        if refusal := self._refusal(connection.no_room, who, _FDS[listener.scheme]):
            self._note_turned_away(refusal, {"address": connection.where})
            self._turned_away[listening_fd].add(connection, refusal)
            return
        fd = connection.fileno()
        self._sessions[fd] = NetworkSession(
            connection, listener.scheme, self, lambda: self._attempt(fd, go_on=True)
        )
        self._loop.watch(fd, READ, self._on_session)

    def _on_session(self, fd: int, events: int) -> None:
        self._attempt(fd, reads=bool(events & READ))

    def _attempt(self, fd: int, *, reads: bool = False, go_on: bool = False) -> None:
        """Perform a session's requests, and send its replies."""
        session = self._sessions[fd]
        tag = 0
        try:
            if go_on:
                session.go_on()
            if reads and not session.closing and not session.given:
                messages = session.connection.recv_ready()
                if messages is EOF:
                    self._end(session)
                    return
                for message in messages:
                    tag = message.tag
                    session.handle(message)
            session.connection.flush()
            if not session.connection.wants_write and (session.closing or session.given):
                self._give(fd) if session.given else self._end(session)
                return
            self._watch(fd, session)
        except (PeerError, CapacityError, OSError) as error:
            of_ours, why = what_failed(error)
            self._drop(session, "limit" if of_ours else "protocol", why, tag)

    def _watch(self, fd: int, session: NetworkSession) -> None:
        events = 0 if session.has_more else READ
        if session.connection.wants_write:
            events |= WRITE
        self._loop.change(fd, events)

    def _give(self, fd: int) -> None:
        """Give the connection to the core's threads; the reply to "data" must have been sent."""
        reach("NETWORK_GIVEN")
        session = self._sessions[fd]
        if session.brings_handoff:
            self._give_handoff(fd)
            return
        entered = session.entered
        assert entered is not None
        address, who = address_of(session.connection), session.who
        sock, tls = session.connection.take_stream()
        del self._sessions[fd]
        self._loop.forget(fd)
        relay = None
        session.entered = None
        if tls is not None:
            try:
                relay = Relay(sock, tls, handshake_seconds=0)
            except OSError as error:
                self._admission.leave(address, _FDS[session.scheme])
                self.leave(entered, was_orderly=False)
                self._log_no_room(error, who)
                return
            sock = relay.inner
        nr_fds = _FDS[session.scheme]

        def on_ended(ended: Ended) -> None:
            del self._numbers[entered.guest]
            self._admission.leave(address, nr_fds)
            how = ended.reason.name.lower()
            _log.info("detached", guest=entered.guest.name, end=how, **who)
            if ended.reason in (NbdEnd.PROTOCOL, NbdEnd.MEMORY):
                self._note_dropped("protocol", "it broke the NBD protocol", who)
            self.leave(entered, was_orderly=ended.reason is NbdEnd.DISC)

        try:
            self._numbers[entered.guest] = self._nbd.serve(entered.guest.export, sock, on_ended)
        except CowshedError as error:
            sock.close()
            self._admission.leave(address, nr_fds)
            self.leave(entered, was_orderly=False)
            self._log_no_room(error, who)
            return
        image = entered.guest.image.label
        _log.info("attached", guest=entered.guest.name, image=image, **who)

    def _give_handoff(self, fd: int) -> None:
        """Give a connection that brings a handoff to a thread of its own."""
        session = self._sessions[fd]
        sock, tls = session.connection.take_stream()
        del self._sessions[fd]
        self._loop.forget(fd)
        address, nr_fds = address_of(session.connection), _FDS[session.scheme]
        leave = functools.partial(self._admission.leave, address, nr_fds)
        try:
            if tls is not None:
                sock = Relay(sock, tls, handshake_seconds=0).inner
        except OSError as error:
            leave()
            self._log_no_room(error, session.who)
            return
        try:
            link = SocketLink(sock, with_it=lambda: self._loop.call(leave))
            self._handoffs.begin(link, session.connection.peer_name)
        except CapacityError as error:
            self._log_no_room(error, session.who)

    def _log_no_room(self, error: CowshedError | OSError, who: dict[str, object]) -> None:
        self._note_dropped("limit", what_failed(error)[1], who)

    def _drop(self, session: NetworkSession, reason: str, why: str, tag: int = 0) -> None:
        self._note_dropped(reason, why, session.who)
        with contextlib.suppress(PeerError):
            kind = "capacity" if reason == "limit" else "peer"
            session.connection.queue(error_reply(kind, why), (), tag)
            session.connection.flush()
        self._end(session)

    def _end(self, session: NetworkSession) -> None:
        fd = session.connection.fileno()
        del self._sessions[fd]
        self._loop.forget(fd)
        self._admission.leave(address_of(session.connection), _FDS[session.scheme])
        session.end()


def _prepare(uri: str, kept_as: str, nbd: NbdService, listeners: Listeners) -> StreamListener:
    """Listen at uri; UsageError on failure. For any thread; may wait for a disk."""
    scheme = scheme_of(uri)
    if scheme not in _FDS:
        raise UsageError(f"cannot listen at {uri!r}: use tcp://, tls:// or vsock://")
    needs_tls = scheme == "tls" and not parse_stream_uri(uri).options
    context = nbd.load_tls() if needs_tls else None
    return listen(uri, context=context, opened_by=functools.partial(listeners.open, kept_as))
