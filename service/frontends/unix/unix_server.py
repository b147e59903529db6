# SPDX-License-Identifier: Apache-2.0
"""The server of guests and operators, at RUN_DIR/cowshed.sock: a session for each connection."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

from cowshed.cache import CapacityError, PeerError
from cowshed.cache.errors import PeerGoneError
from cowshed.service.frontends.frontend_server import FrontendServer
from cowshed.service.frontends.unix.handed_over import HandedOver
from cowshed.service.frontends.unix.session_host import SessionHost
from cowshed.service.frontends.unix.sessions import Session
from cowshed.service.guests.guests import Guest, OpenRequest
from cowshed.service.guests.turned_away import TurnedAway, what_failed
from cowshed.service.host import Host
from cowshed.service.reports.guest_states import log_state
from cowshed.service.runtime.logs import EventLog
from cowshed.service.runtime.loop import READ, WRITE
from cowshed.service.runtime.test_points import reach
from cowshed.transport import EOF, AnyListener
from cowshed.transport.messages.fields import error_reply

__all__ = ["UnixServer"]

_log = EventLog("cowshed")

_EARLY_SECONDS: Final = 0.05


class UnixServer(FrontendServer[Session]):
    """Accepts connections, runs their sessions, and ends those that broke, died or stay silent.

    Everything happens in the loop. The listener is borrowed. A session whose connection has ended
    is parked while its guest's memory lives (parking.py): it keeps its place, and its socket, which
    a successor inherits.
    """

    def __init__(self, listener: AnyListener, host: Host, session_host: SessionHost) -> None:
        super().__init__(host, _log)
        self._listener = listener
        self._host = session_host
        self._turned_away = TurnedAway(host.loop, listener.refill)
        host.loop.watch(listener.fileno(), READ, self._on_connect)
        host.loop.after_calls(self._send_all)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

    def close(self) -> None:
        """End every session; the loop has stopped. Absent pages of parked guests are poisoned, so
        that they read as SIGBUS, not as zeros.
        """
        for session in self._sessions.values():
            if session.mapping is not None and session.mapping.is_parked:
                session.mapping.handler.poison_absent()
            session.end()
        self._sessions.clear()
        self._turned_away.close()

    def notify(self, guest: Guest, event: dict[str, Any]) -> None:
        """Send a guest an event on each of its connections."""
        for fd, session in list(self._sessions.items()):
            mapping = session.mapping
            if mapping is not None and mapping.guest is guest and not mapping.is_parked:
                try:
                    session.connection.queue(event, tag=0)
                    self._send(fd, session)
                except PeerError as error:
                    self._lose(fd, error)

    def log_states(self) -> None:
        """Log each guest that stopped, resumed or broke, once; drop those that broke."""
        for session in list(self._sessions.values()):
            mapping = session.mapping
            if mapping is None:
                continue
            if why := log_state(mapping):
                self._drop(session, "broken", why)

    def end_parked(self, request: OpenRequest) -> bool:
        """End a guest's parked sessions that have nothing mapped; return whether any ended."""
        nr_before = len(self._sessions)
        for session in list(self._sessions.values()):
            parking = session.parking
            if parking and session.key == request.key and parking.is_over():
                self._end(session)
        return len(self._sessions) < nr_before

    def adopt(self, session: Session) -> None:
        """Continue a session that our predecessor had."""
        self._admission.readmit(session.connection.peer.uid)
        fd = session.connection.fileno()
        self._sessions[fd] = session
        self._loop.watch(fd, READ, self._on_session)
        self._watch_death(session)
        try:
            self._send(fd, session)
        except PeerError as error:
            self._lose(fd, error)

    def nr_unfinished(self) -> int:
        """The number of sessions not at rest; stops reading those that are."""
        nr_unfinished = 0
        for fd, session in self._sessions.items():
            if not session.is_at_rest:
                nr_unfinished += 1
            elif session.mapping is None:
                self._loop.mute(fd)
        return nr_unfinished

    def give(self, handed_over: HandedOver) -> None:
        """Hand over the connections at rest that have no mapping: mappings are held already."""
        for session in self._sessions.values():
            if session.mapping is None and session.is_at_rest:
                handed_over.give(session.connection, is_greeted=session.is_greeted)

    def _on_connect(self, *_: int) -> None:
        connection = self._listener.accept_any()
        if connection is None:
            return
        reach("GUEST_CAME")
        peer = connection.peer
        if refusal := self._refusal(connection.no_room, peer.uid):
            self._note_turned_away(refusal, {"pid": peer.pid, "uid": peer.uid})
            self._turned_away.add(connection, refusal)
            return
        session = Session(connection, self._host)
        fd = connection.fileno()
        self._sessions[fd] = session
        self._loop.watch(fd, READ, self._on_session)

    def _on_session(self, fd: int, events: int) -> None:
        session = self._sessions[fd]
        tag = 0
        try:
            if events & READ and not session.closing:
                messages = session.connection.recv_ready()
                if messages is EOF:
                    self._lose(fd)
                    return
                for no, message in enumerate(messages):
                    tag = message.tag
                    try:
                        session.handle(message)
                    except BaseException:
                        for rest in messages[no + 1 :]:
                            rest.close_fds()
                        raise
            self._watch_death(session)
            self._send(fd, session)
            if session.is_early:
                self._loop.once(_EARLY_SECONDS, lambda: self._open_again(fd, session))
        except PeerGoneError as error:
            self._lose(fd, error)
        except (PeerError, CapacityError, OSError) as error:
            # For example, no descriptor is left: the peer that needs it is dropped.
            of_ours, why = what_failed(error)
            self._note_dropped("limit" if of_ours else "protocol", why, session.who)
            self._send_goodbye(session, error_reply("capacity" if of_ours else "peer", why), tag)
            self._end(session)

    def _open_again(self, fd: int, session: Session) -> None:
        """Try an open that waits for pages again."""
        if self._sessions.get(fd) is not session or not session.is_early:
            return
        try:
            session.open_again()
            self._send(fd, session)
        except PeerError as error:
            self._lose(fd, error)
            return
        if session.is_early:
            self._loop.once(_EARLY_SECONDS, lambda: self._open_again(fd, session))

    def _watch_death(self, session: Session) -> None:
        """Watch for a guest's death, even if another process keeps its connection open."""
        pidfd = session.connection.peer.pidfd if session.mapping else None
        if pidfd is None or session.watched_fd >= 0:
            return
        session.watched_fd = pidfd
        self._loop.watch(pidfd, READ, lambda *_: self._end(session))

    def _send_all(self) -> None:
        for fd, session in list(self._sessions.items()):
            if session.connection.wants_write and session.parking is None:
                try:
                    self._send(fd, session)
                except PeerError as error:
                    self._lose(fd, error)

    def _send(self, fd: int, session: Session) -> None:
        done = session.connection.flush()
        if done and session.closing:
            self._end(session)
            return
        if done:
            session.note_sent()
        self._loop.change(fd, READ if done else READ | WRITE)

    def _send_goodbye(self, session: Session, reply: dict[str, Any], tag: int) -> None:
        with contextlib.suppress(PeerError):
            session.connection.queue(reply, tag=tag)
            session.connection.flush()

    def _lose(self, fd: int, error: PeerError | None = None) -> None:
        """End the session of a lost connection, or park it."""
        session = self._sessions[fd]
        if isinstance(error, PeerGoneError | None) and session.park():
            self._loop.forget(fd)
            return
        if isinstance(error, PeerGoneError) and session.mapping is None:
            self._drop(session, "protocol", str(error))
        else:
            self._end(session)

    def _end(self, session: Session) -> None:
        fd = session.connection.fileno()
        del self._sessions[fd]
        if session.parking is None:
            self._loop.forget(fd)
        if session.watched_fd >= 0:
            self._loop.forget(session.watched_fd)
        self._admission.leave(session.connection.peer.uid)
        session.end()

    def _look_after(self) -> None:
        self.log_states()
        for session in list(self._sessions.values()):
            if session.parking is not None and session.parking.is_over():
                self._end(session)
        super()._look_after()
