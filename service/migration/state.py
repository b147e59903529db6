# SPDX-License-Identifier: Apache-2.0
"""A handoff's two roles as tables: what happened in, what to do now out. No sockets, no clock.

The source owns the guests until the target has recorded the commit; that record is the one point
where ownership changes hands. What follows from it:

* The source records that it is about to ask for the commit before it asks. From then on it is
  unsure: it stays frozen and asks what became of it, for as long as it takes.
* A target that is asked before it committed forgets the handoff there and then, so that the answer
  "denied" stays true even if the commit, sent earlier, comes later.
* A target that lost its source before the commit may forget by itself, for the same reason.
* Who restarts knows what was recorded, and nothing else.

By post-copy the pages come after the commit: the target owns, and lacks them. The source is at PUSH
then, which it records; it keeps its frozen pages until the target says that nothing is missing,
which that says once what came outlives it.

Actions are to be done in the order given. A death between two of them is a restart from what was
recorded until then; tests/handoff/test_state.py tries all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from cowshed.cache.errors import UsageError

__all__ = [
    "Action",
    "Event",
    "Handoff",
    "IllegalTransitionError",
    "Phase",
    "Role",
]


class Role(StrEnum):
    """Which end of a handoff."""

    SOURCE = "source"
    TARGET = "target"


class Phase(StrEnum):
    """How far a handoff is. Both ends have IDLE; a source may be in CONNECT to ABORTED."""

    IDLE = "idle"
    CONNECT = "connect"
    PREPARE = "prepare"
    WARM = "warm"
    PRECOPY = "precopy"
    FREEZE = "freeze"
    COMMIT = "commit"  # asked for: who owns is not known here
    PUSH = "push"  # post-copy: the target owns, and its pages are here
    MOVED = "moved"
    ABORTED = "aborted"
    CHECK = "check"
    RECEIVE = "receive"
    READY = "ready"  # all is here and kept; the source's still
    OWNER = "owner"
    FORGOTTEN = "forgotten"


class Event(StrEnum):
    """What happened: to us, or in what the peer said."""

    BEGIN = "begin"
    CONNECTED = "connected"
    ACCEPTED = "accepted"
    REFUSED = "refused"
    SENT = "sent"
    CONVERGED = "converged"
    POSTPONED = "postponed"  # pages are to be sent after the commit
    ARRIVED_READY = "ready"
    COMMITTED = "committed"
    COMMITTED_MISSING = "committed, pages to follow"
    MISSING = "missing"  # the target said which pages it has not
    FILLED = "filled"  # the target has all pages
    DENIED = "denied"
    LOST = "lost"
    ABORT = "abort"
    OFFERED = "offered"
    PIECE = "piece"
    COMPLETE = "complete"
    COMMIT = "commit"
    ASKED = "asked"
    RESUMED = "resumed"  # the source has pages, and asks which are missing


class Action(StrEnum):
    """What is to be done now, in the order given."""

    CLOSE_ADMISSION = "stop admitting"  # admit nobody new
    CONNECT = "connect"
    OFFER = "offer"
    SEND_WORKING_SET = "send the working set"
    TRACK = "track writes"
    SEND_PAGES = "send private pages"
    FREEZE = "freeze"
    SEND_LAST = "send the last pages"
    RECORD_COMMITTING = "record that the commit is asked for"
    SEND_COMMIT = "send commit"
    ASK = "ask what became of it"
    RECORD_PUSHING = "record that pages are to follow"
    SEND_ON = "send guests on"  # those that do not need what is here
    PUSH = "push pages"
    RESUME = "offer pages again"
    RECORD_MOVED = "record that it moved"
    NOTIFY_GUESTS = "tell guests"
    SEND_ABORT = "send abort"
    FORGET_RECORD = "delete the record"
    THAW = "thaw"
    OPEN_ADMISSION = "admit again"
    CHECK = "check the offer"
    SEND_ACCEPTED = "send accepted"
    SEND_REFUSED = "send refused"
    STAGE = "stage"
    KEEP = "keep staged guests across a restart"
    SEND_READY = "send ready"
    RECORD_OWNER = "record that it is ours"
    ADMIT = "admit guests"
    SEND_COMMITTED = "send committed"
    SEND_DENIED = "send denied"
    TAKE_MISSING = "take pages that were missing"
    SEND_MISSING = "send the list of missing pages"
    RECORD_FILLED = "record that no page is missing"
    SEND_FILLED = "send filled"
    DISCARD = "discard staged guests"


class IllegalTransitionError(UsageError):
    """An event that cannot be in this phase; nothing was changed."""


Table = Mapping[tuple[Phase, Event], tuple[Phase, tuple[Action, ...]]]

_ROLLBACK: Final = (Action.THAW, Action.OPEN_ADMISSION)
_BEFORE_COMMIT: Final = (
    Phase.CONNECT,
    Phase.PREPARE,
    Phase.WARM,
    Phase.PRECOPY,
    Phase.FREEZE,
)
_RECORDED: Final = (Phase.COMMIT, Phase.PUSH, Phase.MOVED)
_STAGING: Final = (Phase.CHECK, Phase.RECEIVE, Phase.READY)
_DENY: Final = (Phase.FORGOTTEN, (Action.SEND_DENIED,))

_SOURCE: Final[Table] = {
    (Phase.IDLE, Event.BEGIN): (Phase.CONNECT, (Action.CLOSE_ADMISSION, Action.CONNECT)),
    (Phase.CONNECT, Event.CONNECTED): (Phase.PREPARE, (Action.OFFER,)),
    (Phase.PREPARE, Event.ACCEPTED): (Phase.WARM, (Action.SEND_WORKING_SET,)),
    (Phase.PREPARE, Event.REFUSED): (Phase.ABORTED, _ROLLBACK),
    (Phase.WARM, Event.SENT): (Phase.PRECOPY, (Action.TRACK, Action.SEND_PAGES)),
    (Phase.WARM, Event.POSTPONED): (
        Phase.FREEZE,
        (Action.TRACK, Action.FREEZE, Action.SEND_LAST),
    ),
    (Phase.PRECOPY, Event.SENT): (Phase.PRECOPY, (Action.SEND_PAGES,)),
    (Phase.PRECOPY, Event.CONVERGED): (Phase.FREEZE, (Action.FREEZE, Action.SEND_LAST)),
    (Phase.FREEZE, Event.ARRIVED_READY): (
        Phase.COMMIT,
        (Action.RECORD_COMMITTING, Action.SEND_COMMIT),
    ),
    # Guests wait for the word, and after a death between the two the target is asked once more.
    (Phase.COMMIT, Event.COMMITTED): (Phase.MOVED, (Action.NOTIFY_GUESTS, Action.RECORD_MOVED)),
    (Phase.COMMIT, Event.COMMITTED_MISSING): (
        Phase.PUSH,
        (Action.RECORD_PUSHING, Action.SEND_ON, Action.PUSH),
    ),
    (Phase.PUSH, Event.LOST): (Phase.PUSH, (Action.RESUME,)),
    (Phase.PUSH, Event.MISSING): (Phase.PUSH, (Action.PUSH,)),
    (Phase.PUSH, Event.FILLED): (Phase.MOVED, (Action.RECORD_MOVED, Action.NOTIFY_GUESTS)),
    (Phase.COMMIT, Event.DENIED): (Phase.ABORTED, (Action.FORGET_RECORD, *_ROLLBACK)),
    (Phase.COMMIT, Event.LOST): (Phase.COMMIT, (Action.ASK,)),
    **{(phase, Event.LOST): (Phase.ABORTED, _ROLLBACK) for phase in _BEFORE_COMMIT},
    **{(phase, Event.DENIED): (Phase.ABORTED, _ROLLBACK) for phase in _BEFORE_COMMIT},
    **{
        (phase, Event.ABORT): (Phase.ABORTED, (Action.SEND_ABORT, *_ROLLBACK))
        for phase in _BEFORE_COMMIT
    },
    # What was said twice, since it was asked twice.
    **{
        (phase, event): (phase, ())
        for phase, event in (
            (Phase.MOVED, Event.COMMITTED),
            (Phase.MOVED, Event.COMMITTED_MISSING),
            (Phase.MOVED, Event.MISSING),
            (Phase.MOVED, Event.FILLED),
            (Phase.PUSH, Event.COMMITTED_MISSING),
            (Phase.MOVED, Event.LOST),
            (Phase.ABORTED, Event.DENIED),
            (Phase.ABORTED, Event.LOST),
        )
    },
}

_TARGET: Final[Table] = {
    (Phase.IDLE, Event.OFFERED): (Phase.CHECK, (Action.CHECK,)),
    (Phase.CHECK, Event.ACCEPTED): (Phase.RECEIVE, (Action.SEND_ACCEPTED,)),
    (Phase.CHECK, Event.REFUSED): (Phase.FORGOTTEN, (Action.DISCARD, Action.SEND_REFUSED)),
    (Phase.RECEIVE, Event.PIECE): (Phase.RECEIVE, (Action.STAGE,)),
    (Phase.RECEIVE, Event.COMPLETE): (Phase.READY, (Action.KEEP, Action.SEND_READY)),
    (Phase.READY, Event.COMMIT): (
        Phase.OWNER,
        (Action.RECORD_OWNER, Action.ADMIT, Action.SEND_COMMITTED),
    ),
    **{
        (phase, event): (Phase.FORGOTTEN, (Action.DISCARD,))
        for phase in _STAGING
        for event in (Event.LOST, Event.ABORT)
    },
    **{
        (phase, Event.ASKED): (Phase.FORGOTTEN, (Action.DISCARD, Action.SEND_DENIED))
        for phase in _STAGING
    },
    (Phase.CHECK, Event.COMMIT): (Phase.FORGOTTEN, (Action.DISCARD, Action.SEND_DENIED)),
    (Phase.RECEIVE, Event.COMMIT): (Phase.FORGOTTEN, (Action.DISCARD, Action.SEND_DENIED)),
    (Phase.OWNER, Event.COMMIT): (Phase.OWNER, (Action.SEND_COMMITTED,)),
    (Phase.OWNER, Event.ASKED): (Phase.OWNER, (Action.SEND_COMMITTED,)),
    (Phase.OWNER, Event.LOST): (Phase.OWNER, ()),
    (Phase.OWNER, Event.PIECE): (Phase.OWNER, (Action.TAKE_MISSING,)),
    (Phase.OWNER, Event.RESUMED): (Phase.OWNER, (Action.SEND_MISSING,)),
    (Phase.OWNER, Event.FILLED): (Phase.OWNER, (Action.RECORD_FILLED, Action.SEND_FILLED)),
    (Phase.IDLE, Event.COMMIT): _DENY,
    (Phase.IDLE, Event.ASKED): _DENY,
    (Phase.IDLE, Event.RESUMED): _DENY,
    (Phase.FORGOTTEN, Event.RESUMED): _DENY,
    (Phase.FORGOTTEN, Event.COMMIT): _DENY,
    (Phase.FORGOTTEN, Event.ASKED): _DENY,
    (Phase.FORGOTTEN, Event.OFFERED): _DENY,
    (Phase.FORGOTTEN, Event.COMPLETE): _DENY,
    (Phase.FORGOTTEN, Event.PIECE): (Phase.FORGOTTEN, ()),
    (Phase.FORGOTTEN, Event.LOST): (Phase.FORGOTTEN, ()),
    (Phase.FORGOTTEN, Event.ABORT): (Phase.FORGOTTEN, ()),
}

_TABLES: Final = {Role.SOURCE: _SOURCE, Role.TARGET: _TARGET}


class Handoff:
    """One end of one handoff. Invariant: phase is one that its role's table knows."""

    def __init__(self, role: Role, phase: Phase = Phase.IDLE) -> None:
        self.role: Final = role
        self.phase = phase

    @classmethod
    def restarted(cls, role: Role, recorded: Phase | None) -> Handoff:
        """Go on with what the last process of this end recorded: COMMIT, PUSH, MOVED, OWNER.

        With nothing recorded a source owns as if it had never begun, and a target knows nothing.
        """
        if recorded is None:
            return cls(role, Phase.IDLE if role is Role.SOURCE else Phase.FORGOTTEN)
        known = _RECORDED if role is Role.SOURCE else (Phase.OWNER,)
        if recorded not in known:
            raise IllegalTransitionError(f"a {role} records no {recorded!r}; remove the record")
        return cls(role, recorded)

    def on(self, event: Event) -> tuple[Action, ...]:
        """Take an event and give what is to be done; IllegalTransitionError changes nothing."""
        following = _TABLES[self.role].get((self.phase, event))
        if following is None:
            raise IllegalTransitionError(
                f"{event.value!r} cannot be while the {self.role.value} is at {self.phase.value!r}"
            )
        self.phase, actions = following
        return actions

    def allows(self, event: Event) -> bool:
        """Whether on(event) would be legal now."""
        return (self.phase, event) in _TABLES[self.role]

    @property
    def owns(self) -> bool:
        """Whether this end is sure to own the guests; both never are at the same time."""
        if self.role is Role.TARGET:
            return self.phase is Phase.OWNER
        return self.phase not in _RECORDED

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to be done or found out."""
        return self.phase in (Phase.MOVED, Phase.ABORTED, Phase.OWNER, Phase.FORGOTTEN)

    @property
    def withholds_writes(self) -> bool:
        """Whether guests' writes must wait here."""
        return self.phase is Phase.FREEZE or self.phase in _RECORDED
