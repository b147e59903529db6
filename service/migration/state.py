# SPDX-License-Identifier: Apache-2.0
"""A handoff's two roles as tables: events in, actions out. No sockets, no clock.

The source owns the guests until the target has recorded the commit; that record is the one point
where ownership changes. It follows:

* The source records that it is about to request the commit before it freezes guests, so that none
  waits for its disk. Once it has requested the commit it does not know who owns: it stays frozen
  and asks for the outcome, for as long as it takes. So does its successor if it dies after the
  record; a target that was not asked to commit then denies it.
* A target that is asked before it committed forgets the handoff at once, so that its answer
  "denied" stays true even if a commit that was sent earlier arrives later.
* A target that lost its source before the commit may forget the handoff, for the same reason.
* After a restart either end knows only what was recorded.

In post-copy the pages are sent after the commit: the target owns the guests and their pages are
missing. The source is then at PUSH, which it records. It keeps its frozen pages until the target
reports that nothing is missing, which the target does once all pages are durable.

The caller must perform actions in the order given. A death between two of them is a restart from
what was recorded until then; tests/handoff/test_state.py tries all of them.
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
    """The phase of a handoff. IDLE is of both ends, CONNECT to ABORTED of the source only."""

    IDLE = "idle"
    CONNECT = "connect"
    PREPARE = "prepare"
    WARM = "warm"
    PRECOPY = "precopy"
    FREEZE = "freeze"
    COMMIT = "commit"  # requested: the source does not know who owns
    PUSH = "push"  # post-copy: the target owns, and missing pages are here
    MOVED = "moved"
    ABORTED = "aborted"
    CHECK = "check"
    RECEIVE = "receive"
    READY = "ready"  # all is here and durable; the source still owns
    OWNER = "owner"
    FORGOTTEN = "forgotten"


class Event(StrEnum):
    """What happened: here, or by a message of the peer."""

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
    MISSING = "missing"  # the target sent the list of missing pages
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
    """What the caller must do now, in the order given."""

    CLOSE_ADMISSION = "stop admitting"
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
    SEND_ON = "send guests on"  # end the connections of overlays' clients
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
    """An event that is illegal in this phase; nothing was changed."""


Table = Mapping[tuple[Phase, Event], tuple[Phase, tuple[Action, ...]]]

_ROLLBACK: Final = (Action.THAW, Action.OPEN_ADMISSION)
# The record is deleted after the thaw: guests need not wait for it, see Drain._forget_record.
_ROLLBACK_RECORDED: Final = (Action.THAW, Action.FORGET_RECORD, Action.OPEN_ADMISSION)
_BEFORE_COMMIT: Final = {
    Phase.CONNECT: _ROLLBACK,
    Phase.PREPARE: _ROLLBACK,
    Phase.WARM: _ROLLBACK,
    Phase.PRECOPY: _ROLLBACK,
    Phase.FREEZE: _ROLLBACK_RECORDED,
}
_FREEZE: Final = (Action.RECORD_COMMITTING, Action.FREEZE, Action.SEND_LAST)
_RECORDED: Final = (Phase.COMMIT, Phase.PUSH, Phase.MOVED)
_STAGING: Final = (Phase.CHECK, Phase.RECEIVE, Phase.READY)
_DENY: Final = (Phase.FORGOTTEN, (Action.SEND_DENIED,))

_SOURCE: Final[Table] = {
    (Phase.IDLE, Event.BEGIN): (Phase.CONNECT, (Action.CLOSE_ADMISSION, Action.CONNECT)),
    (Phase.CONNECT, Event.CONNECTED): (Phase.PREPARE, (Action.OFFER,)),
    (Phase.PREPARE, Event.ACCEPTED): (Phase.WARM, (Action.SEND_WORKING_SET,)),
    (Phase.PREPARE, Event.REFUSED): (Phase.ABORTED, _ROLLBACK),
    (Phase.WARM, Event.SENT): (Phase.PRECOPY, (Action.TRACK, Action.SEND_PAGES)),
    (Phase.WARM, Event.POSTPONED): (Phase.FREEZE, (Action.TRACK, *_FREEZE)),
    (Phase.PRECOPY, Event.SENT): (Phase.PRECOPY, (Action.SEND_PAGES,)),
    (Phase.PRECOPY, Event.CONVERGED): (Phase.FREEZE, _FREEZE),
    (Phase.FREEZE, Event.ARRIVED_READY): (Phase.COMMIT, (Action.SEND_COMMIT,)),
    # Notify first, since guests wait; after a death before the record the target is asked again.
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
    **{
        (phase, event): (Phase.ABORTED, rollback)
        for phase, rollback in _BEFORE_COMMIT.items()
        for event in (Event.LOST, Event.DENIED)
    },
    **{
        (phase, Event.ABORT): (Phase.ABORTED, (Action.SEND_ABORT, *rollback))
        for phase, rollback in _BEFORE_COMMIT.items()
    },
    # A repeated answer, because the question was repeated.
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
    """One end of one handoff. Invariant: phase is in its role's table."""

    def __init__(self, role: Role, phase: Phase = Phase.IDLE) -> None:
        self.role: Final = role
        self.phase = phase

    @classmethod
    def restarted(cls, role: Role, recorded: Phase | None) -> Handoff:
        """Continue from what the last process of this end recorded: COMMIT, PUSH, MOVED or OWNER.

        With nothing recorded, a source owns as if it had never begun, and a target has forgotten.
        """
        if recorded is None:
            return cls(role, Phase.IDLE if role is Role.SOURCE else Phase.FORGOTTEN)
        known = _RECORDED if role is Role.SOURCE else (Phase.OWNER,)
        if recorded not in known:
            raise IllegalTransitionError(f"a {role} never records {recorded!r}; remove the record")
        return cls(role, recorded)

    def on(self, event: Event) -> tuple[Action, ...]:
        """Take an event and return the actions; IllegalTransitionError changes nothing."""
        following = _TABLES[self.role].get((self.phase, event))
        if following is None:
            raise IllegalTransitionError(
                f"event {event.value!r} is illegal while the {self.role.value} is at "
                f"{self.phase.value!r}"
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
        """Whether the handoff has ended for this end."""
        return self.phase in (Phase.MOVED, Phase.ABORTED, Phase.OWNER, Phase.FORGOTTEN)

    @property
    def withholds_writes(self) -> bool:
        """Whether guests' writes must wait here."""
        return self.phase is Phase.FREEZE or self.phase in _RECORDED
