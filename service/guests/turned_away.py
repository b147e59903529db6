# SPDX-License-Identifier: Apache-2.0
"""Connections that there is no room for, until each is refused: a few at a time, in the loop.

If a connection is closed with a request unread, its peer may never see the refusal that was sent.
So the loop waits a moment for the first request, and refuses that.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable
from typing import Final

from cowshed.cache import CapacityError, CowshedError
from cowshed.service.runtime.loop import READ, WRITE, Loop
from cowshed.transport import EOF, Connection
from cowshed.transport.links.acceptor import NO_ROOM, NR_SPARE
from cowshed.transport.links.no_room import no_room
from cowshed.transport.messages.fields import error_reply

__all__ = ["TurnedAway", "what_failed"]

# Fewer than the acceptor's reserve: each connection here may use a descriptor of it.
_PLACES: Final = NR_SPARE - 1
_WAIT_SECONDS: Final = 5.0
_LOOK_SECONDS: Final = 1.0
# The tag of a client's first request, hello.
_FIRST_TAG: Final = 1


def what_failed(error: CowshedError | OSError) -> tuple[bool, str]:
    """Return whether an error means that we have no room, and its message in one line."""
    if isinstance(error, OSError) and error.errno in (*NO_ROOM, errno.EAGAIN):
        return True, no_room(error.errno)
    return isinstance(error, CapacityError), str(error)


class TurnedAway:
    """Owns the connections given to add(), each until its peer was sent why it is turned away.

    Invariant: at most _PLACES are here; to add another, the oldest is refused and closed at once.
    """

    def __init__(self, loop: Loop, refill: Callable[[], None]) -> None:
        """refill() is called after each close, to fill the acceptor's reserve again."""
        self._loop = loop
        self._refill = refill
        self._waiting: dict[int, tuple[Connection, str, float]] = {}
        loop.every(_LOOK_SECONDS, self._look_after)

    def add(self, connection: Connection, why: str) -> None:
        """Refuse a peer, for the reason in one line, and close the connection."""
        if len(self._waiting) == _PLACES:
            self._refuse(next(iter(self._waiting)), _FIRST_TAG)
        fd = connection.fileno()
        self._waiting[fd] = connection, why, time.monotonic() + _WAIT_SECONDS
        self._loop.watch(fd, READ, self._on_ready)
        self._on_ready(fd, READ)

    def close(self) -> None:
        """Close all; the loop has stopped."""
        for fd in list(self._waiting):
            self._end(fd)

    def _on_ready(self, fd: int, events: int) -> None:
        connection = self._waiting[fd][0]
        tag = 0
        try:
            if events & READ:
                messages = connection.recv_ready()
                if messages is EOF:
                    self._end(fd)
                    return
                for message in messages:
                    tag = tag or message.tag
                    message.close_fds()
            if tag:
                self._refuse(fd, tag)
                return
            connection.flush()  # of a TLS handshake
            self._loop.change(fd, READ | (WRITE if connection.wants_write else 0))
        except (CowshedError, OSError):
            self._end(fd)

    def _refuse(self, fd: int, tag: int) -> None:
        connection, why, _ = self._waiting[fd]
        with contextlib.suppress(CowshedError, OSError):
            connection.queue(error_reply("capacity", why), tag=tag)
            connection.flush()  # one packet, for which a new socket has room
        self._end(fd)

    def _end(self, fd: int) -> None:
        connection, _, _ = self._waiting.pop(fd)
        self._loop.forget(fd)
        connection.close()
        self._refill()

    def _look_after(self) -> None:
        now = time.monotonic()
        for fd, (_, _, deadline) in list(self._waiting.items()):
            if now > deadline:
                self._refuse(fd, _FIRST_TAG)
