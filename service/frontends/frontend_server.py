# SPDX-License-Identifier: Apache-2.0
"""The base of every server: accept, admit, run a session with a deadline, end it."""

from __future__ import annotations

import time
from collections.abc import Hashable
from typing import Final, Generic, Protocol, TypeVar

from cowshed.service.host import Host
from cowshed.service.runtime.logs import EventLog
from cowshed.transport.links.no_room import no_room

__all__ = ["FrontendServer", "FrontendSession"]

_LOOK_SECONDS: Final = 1.0


class FrontendSession(Protocol):
    """An admitted connection, until it has ended."""

    @property
    def deadline(self) -> float | None:
        """When the handshake must have progressed (time.monotonic()); None: no deadline."""

    @property
    def who(self) -> dict[str, object]:
        """The peer's fields in a log line."""


S = TypeVar("S", bound=FrontendSession)


class FrontendServer(Generic[S]):
    """Admits peers, and ends those that break a rule or miss their deadline. All in the loop.

    A subclass accepts connections, makes the sessions, and releases them in _end().

    Invariant: each of _sessions, by a number of its own, was admitted once, and leaves at its end.
    """

    _LATE = "it did not finish its handshake in time"

    def __init__(self, host: Host, log: EventLog) -> None:
        self._admission: Final = host.admission
        self._counters: Final = host.counters
        self._loop: Final = host.loop
        self._log: Final = log
        self._sessions: dict[int, S] = {}
        host.loop.every(_LOOK_SECONDS, self._look_after)

    def _refusal(self, errno: int, counted_as: Hashable, nr_fds: int | None = None) -> str:
        """Admit a peer and return "", or return why there is no place. _end() must give it back.

        errno is the error of accepting it if no descriptor was left, or 0.
        """
        if errno:
            return no_room(errno)
        nr = () if nr_fds is None else (nr_fds,)
        return self._admission.enter(counted_as, *nr)

    def _note_turned_away(self, why: str, who: dict[str, object], reason: str = "limit") -> None:
        self._counters.note_dropped(reason)
        self._log.warning("turned-away", why, **who)

    def _note_dropped(self, reason: str, why: str, who: dict[str, object]) -> None:
        self._counters.note_dropped(reason)
        self._log.warning("dropped", why, **who)

    def _drop(self, session: S, reason: str, why: str) -> None:
        """End a session, count the reason and log why."""
        self._note_dropped(reason, why, session.who)
        self._end(session)

    def _end(self, session: S) -> None:
        """Release a session and its place."""
        raise NotImplementedError

    def _look_after(self) -> None:
        """Drop sessions past their deadline; called once a second."""
        now = time.monotonic()
        for session in list(self._sessions.values()):
            if session.deadline is not None and now > session.deadline:
                self._drop(session, "handshake", self._LATE)
