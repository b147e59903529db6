# SPDX-License-Identifier: Apache-2.0
"""One connection's session: which requests it may make when, and how they are performed.

    NEW --hello--> IDLE --open--> OPENED --region--> ATTACHED --close--> CLOSED
                   IDLE: describe; operators' requests, if the peer is root or our own user

A request out of turn or with malformed fields is the peer's error and ends its connection. A valid
request that cannot be met is refused, and the session continues.
"""

from __future__ import annotations

import contextlib
import enum
import os
import time
from collections.abc import Iterator
from typing import Any, Final

from cowshed.accounting import Region
from cowshed.cache import (
    CowshedError,
    Image,
    PeerError,
    UsageError,
)
from cowshed.faults import uffd_features
from cowshed.service.frontends.unix.open_requests import check_region, read_open_request
from cowshed.service.frontends.unix.parking import Parking
from cowshed.service.frontends.unix.session_host import SessionHost
from cowshed.service.guests.guest_records import RestoredGuest
from cowshed.service.guests.guests import Guest, GuestProcess, Mapping, OpenRequest
from cowshed.service.images.generations import image_generation
from cowshed.service.images.reopening import Reopened
from cowshed.service.migration.incoming import IncomingGuest
from cowshed.service.persist.inherited import record_close
from cowshed.service.runtime.logs import EventLog
from cowshed.service.runtime.test_points import reach
from cowshed.service.settings.domains import Identity, is_operator
from cowshed.transport import Connection, Received
from cowshed.transport.messages.fields import (
    error_reply,
    refusal,
    take_flag,
    take_number,
    take_text,
)

__all__ = ["Session"]

_log = EventLog("cowshed.sessions")

Body = dict[str, Any]

_VERSION: Final = 1
_HANDSHAKE_SECONDS: Final = 10.0


class SessionState(enum.Enum):
    """The state of a session; the module's docstring has the transitions."""

    NEW = enum.auto()
    IDLE = enum.auto()
    EARLY = enum.auto()  # its open waits for private pages that are still arriving here
    OPENED = enum.auto()
    ATTACHED = enum.auto()
    CLOSED = enum.auto()


_NEXT: Final = {
    (SessionState.NEW, "hello"): SessionState.IDLE,
    (SessionState.IDLE, "describe"): SessionState.IDLE,
    (SessionState.IDLE, "open"): SessionState.OPENED,
    (SessionState.OPENED, "region"): SessionState.ATTACHED,
    (SessionState.OPENED, "close"): SessionState.CLOSED,
    (SessionState.IDLE, "close"): SessionState.CLOSED,
    (SessionState.ATTACHED, "writable"): SessionState.ATTACHED,
    (SessionState.ATTACHED, "close"): SessionState.CLOSED,
}


class Session:
    """The backend's half of one connection; end() releases whatever it has.

    deadline is when a handshake must have progressed (time.monotonic()), or None. watched_fd is
    the guest's pidfd once the loop watches it, else -1. parking is set once the connection has
    ended before its mapping.
    """

    def __init__(self, connection: Connection, host: SessionHost) -> None:
        self.connection: Final = connection
        self.mapping: Mapping | None = None
        self.deadline: float | None = time.monotonic() + _HANDSHAKE_SECONDS
        self.watched_fd = -1
        self.parking: Parking | None = None
        self._host = host
        self._state = SessionState.NEW
        self._opened: tuple[Guest, OpenRequest] | None = None
        self._moved: IncomingGuest | None = None
        self._kept_as = ""
        self._nr_working = 0
        self._is_answered = True
        self._early: tuple[SessionState, Received] | None = None
        self._read_only = False

    @classmethod
    def of_restored(cls, restored: RestoredGuest, host: SessionHost) -> Session:
        """Make the session of a restored mapping, attached; sends a reply that was not sent."""
        session = cls(restored.connection, host)
        session.mapping = restored.mapping
        session.deadline = None
        session._state = SessionState.ATTACHED
        session._opened = restored.mapping.guest, restored.request
        session._kept_as = restored.group
        if restored.tag is not None:
            session._is_answered = False
            session._reply(restored.tag, {"ok": True, "guest": restored.request.name})
        return session

    @property
    def key(self) -> tuple[str, str] | None:
        """The key of the guest whose name this session has, or None."""
        return None if self._opened is None else self._opened[1].key

    @classmethod
    def handed_over(cls, connection: Connection, host: SessionHost, *, is_greeted: bool) -> Session:
        """Continue a session that our predecessor handed over at rest."""
        session = cls(connection, host)
        if is_greeted:
            session._state = SessionState.IDLE
            session.deadline = None
        return session

    @property
    def who(self) -> dict[str, object]:
        """The fields of a log line: the peer, and its guest if there is one."""
        mapping, peer = self.mapping, self.connection.peer
        return {
            "guest": mapping and mapping.name,
            "image": mapping and mapping.image.label,
            "pid": peer.pid,
            "uid": peer.uid,
        }

    @property
    def is_greeted(self) -> bool:
        """Whether the peer sent hello."""
        return self._state is not SessionState.NEW

    @property
    def is_at_rest(self) -> bool:
        """Whether this process can end unnoticed by the peer, if the socket outlives it."""
        if self.mapping is not None:
            return True  # the keeper holds it, and a reply that may not have been sent
        return (
            self._state in (SessionState.NEW, SessionState.IDLE)
            and not self._nr_working
            and not self.connection.wants_write
        )

    @property
    def closing(self) -> bool:
        """Whether the session is over and only replies are left to send."""
        return self._state is SessionState.CLOSED

    def park(self) -> bool:
        """Park the mapping, whose connection has ended without "close"; False if none is left."""
        if self.mapping is None or self._state is not SessionState.ATTACHED:
            return False
        parking = Parking(self.mapping)
        if parking.is_over():
            return False
        self.parking = parking
        return True

    def end(self) -> None:
        """Detach the guest, if there is one, and close the connection; idempotent."""
        self._state = SessionState.CLOSED
        self._detach()
        opened, self._opened = self._opened, None
        if opened is not None:
            self._host.guests.release(opened[0])
        moved, self._moved = self._moved, None
        if moved is not None:
            self._host.incoming.leave(moved)
        self.connection.close()

    def note_sent(self) -> None:
        """Note that all queued messages were sent, and so the reply to "region"."""
        if self._state is SessionState.OPENED:
            reach("OPEN_TOLD")
        if not self._is_answered and self.mapping is not None:
            reach("REGION_TOLD")
            self._is_answered = True
            record_close(self.mapping.fds[-1])

    def handle(self, message: Received) -> None:
        """Perform one request and queue the reply; PeerError ends the connection."""
        try:
            self._dispatch(message)
        except PeerError:
            raise
        except CowshedError as error:
            self._refuse(message.tag, error)
        finally:
            message.close_fds()

    def _dispatch(self, message: Received) -> None:
        op = take_text(message.body, "op", max_length=32)
        following = _NEXT.get((self._state, op))
        if op == "open" and following is not None and self._comes_too_early(message):
            return
        if following is not None and op == "region" and take_flag(message.body, "rehearse"):
            self._check_region(message)
            self._reply(message.tag, {"ok": True})
        elif following is not None:
            getattr(self, f"_on_{op}")(message)
            self._state = following
            self.deadline = (
                time.monotonic() + _HANDSHAKE_SECONDS if following is SessionState.OPENED else None
            )
        elif self._state is SessionState.IDLE and (
            op == "shutdown" or self._host.control.knows(op)
        ):
            self._on_control(op, message)
        elif self._state is SessionState.NEW:
            raise PeerError(f"the first request must be 'hello', not {op!r}")
        elif any(op == known for _, known in _NEXT):
            raise PeerError(f"request {op!r} does not fit here ({self._state.name.lower()})")
        else:
            self._reply(message.tag, error_reply("unknown", f"no request {op!r} is known here"))

    def _on_hello(self, message: Received) -> None:
        take_number(message.body, "version", minimum=1)
        self._reply(
            message.tag,
            {"ok": True, "version": _VERSION, "features": ["map"], "pid": os.getpid()},
        )

    def _on_describe(self, message: Received) -> None:
        image, tag = self._find_image(take_text(message.body, "image")), message.tag
        self._nr_working += 1
        self._host.reopener.reopen(image, lambda got: self._describe(tag, image, got))

    def _describe(self, tag: int, image: Image, got: Reopened | CowshedError) -> None:
        self._nr_working -= 1
        if isinstance(got, CowshedError):
            self._late_reply(tag, refusal(got))
            return
        description = {
            "ok": True,
            "size_bytes": image.size_bytes,
            "map_bytes": image.map_bytes,
            "extent_bytes": image.extent_bytes,
            "digest": image.digest or None,
            "source_device": got.device,
            "source_inode": got.inode,
        }
        try:
            self._late_reply(tag, description, [got.fd])
        except CowshedError as error:  # no descriptor is left
            self._refuse(tag, error)
        finally:
            os.close(got.fd)

    def _comes_too_early(self, message: Received) -> bool:
        """Whether the guest's pages are still arriving; then open_again() answers the open."""
        if not self._host.incoming.lacks(self._read_open(message)):
            return False
        if self._early is None:
            _log.notice(
                "open-waits", "the guest's pages are still arriving", pid=self.connection.peer.pid
            )
        self._early = self._state, message
        self._state = SessionState.EARLY
        self.deadline = None
        return True

    @property
    def is_early(self) -> bool:
        """Whether its open waits for pages; the owner must call open_again() repeatedly."""
        return self._state is SessionState.EARLY and self._early is not None

    def open_again(self) -> None:
        """Answer an open that waits, if its pages have arrived."""
        assert self._early is not None
        self._state, message = self._early
        self.handle(message)

    def _on_open(self, message: Received) -> None:
        request = self._read_open(message)
        self._read_only = request.read_only
        if (found := self._host.incoming.enter(request, self._peer())) is not None:
            self._moved, request = found
            self._opened = self._moved.guest, request
        elif take_flag(message.body, "moved") and not self._carries_on(request):
            # The guest relies on its private pages: without them it must not be served.
            raise UsageError(
                f"guest {request.name!r} moved here, and its private pages are in use or lost; "
                "see this backend's log"
            )
        else:
            self._opened = self._reserve(request), request
        image = request.image
        device = self._host.uffd_device
        fds = [image.guest_fd] if device is None else [image.guest_fd, device]
        self._reply(
            message.tag,
            {
                "ok": True,
                "size_bytes": image.size_bytes,
                "map_bytes": image.map_bytes,
                "extent_bytes": image.extent_bytes,
                "uffd_features": uffd_features(),
                "digest": image.digest or None,
                "generation": image_generation(image),
                "guest": request.name,
            },
            fds,
        )

    def _carries_on(self, request: OpenRequest) -> bool:
        """Whether this mapping brings its own pages, and the guest has another mapping here."""
        return request.carries and self._host.guests.has_joined(request, self._peer())

    def _reserve(self, request: OpenRequest) -> Guest:
        try:
            return self._host.guests.reserve(request, self._peer())
        except UsageError:
            # It may be the same program, reconnecting after it left without "close".
            if not self._host.end_parked(request):
                raise
        return self._host.guests.reserve(request, self._peer())

    def _read_open(self, message: Received) -> OpenRequest:
        pid = self.connection.peer.pid
        return read_open_request(message.body, self._host.config, self._find_image, pid)

    def _find_image(self, name: str) -> Image:
        """Return the image of that name in the peer's domain."""
        peer = self.connection.peer
        return self._host.control.find_guest_image(name, Identity(peer.uid, peer.gid))

    def _peer(self) -> GuestProcess:
        peer = self.connection.peer
        return GuestProcess(peer.pid, peer.uid, -1 if peer.pidfd is None else peer.pidfd)

    def _check_region(self, message: Received) -> int:
        assert self._opened is not None
        self._host.control.check_open()  # it may have opened before the drain
        return check_region(message, self._opened[1], self.connection.peer)

    def _on_region(self, message: Received) -> None:
        address = self._check_region(message)
        assert self._opened is not None
        guest, request = self._opened
        inherited = take_flag(message.body, "inherited")
        self.mapping = self._host.guests.attach(
            guest,
            request.options,
            self._peer(),
            [Region(address, request.offset_bytes, request.length_bytes)],
            list(message.fds),
            inherited=inherited,
            preload=None if self._moved is None else self._moved.preload,
            read_only=self._read_only,
        )
        self.mapping.carries = request.carries
        message.fds.clear()
        reach("REGION_ATTACHED")
        self._kept_as = self._host.guest_records.keep(
            self.mapping, self.connection, request, message.tag
        )
        if self._moved is not None:
            moved, self._moved = self._moved, None
            self._host.incoming.complete(moved)
        reach("REGION_HELD")
        self._is_answered = not self._kept_as
        peer = self.connection.peer
        _log.info(
            "attached", guest=request.name, image=request.image.label, pid=peer.pid, uid=peer.uid
        )
        self._reply(message.tag, {"ok": True, "guest": request.name})

    def _on_writable(self, message: Received) -> None:
        """A program is about to make writable what it mapped for reading: charge it from now on."""
        assert self.mapping is not None
        self.mapping.account.set_read_only(False)
        self._reply(message.tag, {"ok": True})

    def _on_close(self, message: Received) -> None:
        self._detach()
        self._reply(message.tag, {"ok": True})

    def _detach(self) -> None:
        mapping, self.mapping = self.mapping, None
        if mapping is not None:
            self._host.guest_records.release(self._kept_as)
            self._host.guests.detach(mapping)
            _log.info(
                "detached",
                guest=mapping.name,
                image=mapping.image.label,
                pid=mapping.pid,
                uid=mapping.uid,
            )

    def _on_control(self, op: str, message: Received) -> None:
        uid = self.connection.peer.uid
        if not is_operator(uid):
            denied = f"{op!r} is for root and the daemon's user, not for uid {uid}"
            self._reply(message.tag, error_reply("denied", denied))
            return
        if op == "shutdown":
            self._reply(message.tag, {"ok": True})
            self._host.shut_down()
            return
        tag, body = message.tag, message.body
        fds = list(message.fds)
        message.fds.clear()

        def work() -> Iterator[Body]:
            try:
                for reply in self._host.control.perform(op, body, fds):
                    yield reply
                    if self.closing:
                        return  # the peer does not wait for the rest
            except CowshedError as error:
                yield refusal(error)

        self._nr_working += 1
        self._host.workers.submit(
            work,
            lambda reply: self._late_reply(tag, reply),
            self._note_done,
            is_quick=self._host.control.is_quick(op, body),
        )

    def _note_done(self) -> None:
        self._nr_working -= 1

    def _late_reply(self, tag: int, reply: Body, fds: list[int] | None = None) -> None:
        if self._state is not SessionState.CLOSED:
            # The loop notices a peer that is gone or reads nothing.
            with contextlib.suppress(PeerError):
                try:
                    self._reply(tag, reply, fds)
                except UsageError as error:  # too long to send
                    self._refuse(tag, error)

    def _refuse(self, tag: int, error: CowshedError) -> None:
        self._reply(tag, refusal(error))

    def _reply(self, tag: int, body: Body, fds: list[int] | None = None) -> None:
        self.connection.queue(body, fds or (), tag)
