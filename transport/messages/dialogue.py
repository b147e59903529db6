# SPDX-License-Identifier: Apache-2.0
"""A conversation between two programs, without a socket: messages in, events out.

    connecting:  NEW --hello sent--> GREETING --its reply--> OPEN --end--> GONE
    accepting:   NEW --hello came, reply due--> OPEN --end--> GONE

Then either side may send requests, and answer in any order. A request has "op" and a tag that its
sender chooses; its replies have "ok" and the same tag: any number of replies with "progress", then
one without. The tags of the two directions are independent.

The peer's errors are PeerError, and end the conversation: a request in the wrong phase, a reply to
no request, a tag in use, more unanswered requests than agreed. Our own are UsageError, and
CapacityError for one request too many; those change nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from cowshed.cache.errors import CapacityError, PeerError, UsageError
from cowshed.transport.messages.fields import check_reply, take_number, take_text
from cowshed.transport.messages.protocol import (
    MAX_REPLY_BYTES,
    MAX_REQUEST_BYTES,
    MAX_TAG,
    VERSION,
    Body,
)

__all__ = ["MAX_OUTSTANDING", "Answer", "Asked", "Dialogue", "DialoguePhase", "Greeted"]

MAX_OUTSTANDING: Final = 64
MIN_MESSAGE_BYTES: Final = 4096
_MAX_FEATURES: Final = 64


class DialoguePhase(enum.Enum):
    """The state of a conversation; see the module's diagram."""

    NEW = enum.auto()
    GREETING = enum.auto()
    OPEN = enum.auto()
    GONE = enum.auto()


@dataclass(frozen=True, slots=True)
class Greeted:
    """Both hellos are exchanged; the caller must send reply, if any, with tag."""

    tag: int
    reply: Body | None


@dataclass(frozen=True, slots=True)
class Asked:
    """The peer made a request; the caller must answer(tag)."""

    tag: int
    body: Body


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply of the peer to our request of this tag; more follow unless it is the last."""

    tag: int
    body: Body
    last: bool


@dataclass
class Dialogue:
    """One side of a conversation.

    Invariants: (1) _ours, our unanswered requests, are at most their_limit; (2) _theirs, the peer's
    unanswered requests, are at most our_limit; (3) both are empty unless OPEN, except for our hello
    while GREETING.
    """

    our_features: frozenset[str] = frozenset()
    our_limit: int = MAX_OUTSTANDING
    their_limit: int = MAX_OUTSTANDING
    our_message_bytes: int = MAX_REPLY_BYTES
    their_message_bytes: int = MAX_REQUEST_BYTES
    version: int = VERSION
    features: frozenset[str] = frozenset()
    phase: DialoguePhase = DialoguePhase.NEW
    _ours: set[int] = field(default_factory=set)
    _theirs: set[int] = field(default_factory=set)
    _last_tag: int = 0

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold."""
        assert len(self._ours) <= max(1, self.their_limit)
        assert len(self._theirs) <= self.our_limit
        assert self.phase is DialoguePhase.OPEN or not self._theirs
        assert self.phase is DialoguePhase.OPEN or len(self._ours) == (
            self.phase is DialoguePhase.GREETING
        )

    def hello(self) -> tuple[int, Body]:
        """Return the tag and body of hello, the first message of the side that connected."""
        if self.phase is not DialoguePhase.NEW:
            raise UsageError("hello was sent already")
        tag = self._new_tag()
        self.phase = DialoguePhase.GREETING
        return tag, {"op": "hello", **self._introduction()}

    def ask(self) -> int:
        """Return the tag for a request of ours.

        Raises UsageError before hello and after the end, CapacityError at the peer's limit.
        """
        if self.phase is not DialoguePhase.OPEN:
            raise UsageError(
                f"no request can be made: the conversation is {self.phase.name.lower()}"
            )
        if len(self._ours) >= self.their_limit:
            raise CapacityError(
                f"{len(self._ours)} requests are unanswered, and the peer takes no more; "
                "wait for one of them"
            )
        return self._new_tag()

    def forget(self, tag: int) -> None:
        """Undo an ask() whose request could not be sent."""
        self._ours.discard(tag)

    def answer(self, tag: int, body: Body) -> None:
        """Record that the peer's request of this tag is answered with body."""
        if tag not in self._theirs:
            raise UsageError(f"no request with tag {tag} waits for an answer")
        if "progress" not in body:
            self._theirs.remove(tag)

    def end(self) -> None:
        """Record the end of the connection, and forget all requests."""
        self.phase = DialoguePhase.GONE
        self._ours.clear()
        self._theirs.clear()

    def take(self, tag: int, body: Body) -> Greeted | Asked | Answer:
        """Take a received message and return the event that it is."""
        if "op" in body:
            return self._take_request(tag, body)
        if tag not in self._ours:
            raise PeerError(f"peer answered tag {tag}, which is no unanswered request of ours")
        if self.phase is DialoguePhase.GREETING:
            self._take_introduction(check_reply(body))
            self._ours.remove(tag)
            self.phase = DialoguePhase.OPEN
            return Greeted(tag, None)
        last = "progress" not in body
        if last:
            self._ours.remove(tag)
        return Answer(tag, body, last)

    def _take_request(self, tag: int, body: Body) -> Greeted | Asked:
        op = take_text(body, "op", max_length=64)
        if self.phase is DialoguePhase.NEW and op == "hello":
            self._take_introduction(body)
            self.phase = DialoguePhase.OPEN
            return Greeted(tag, {"ok": True, **self._introduction()})
        if self.phase is not DialoguePhase.OPEN or op == "hello":
            raise PeerError(f"request {op!r} does not fit here ({self.phase.name.lower()})")
        if tag in self._theirs:
            raise PeerError(f"request {op!r} reuses tag {tag}, which is still unanswered")
        if len(self._theirs) >= self.our_limit:
            raise PeerError(
                f"peer has {len(self._theirs)} unanswered requests; at most {self.our_limit}"
            )
        self._theirs.add(tag)
        return Asked(tag, body)

    def _introduction(self) -> Body:
        return {
            "version": VERSION,
            "features": sorted(self.our_features),
            "max_outstanding": self.our_limit,
            "max_message_bytes": self.our_message_bytes,
        }

    def _take_introduction(self, body: Body) -> None:
        version = take_number(body, "version", minimum=1)
        self.version = min(version, VERSION)
        features = body.get("features", [])
        if not isinstance(features, list) or len(features) > _MAX_FEATURES:
            raise PeerError(f"features must be a list of at most {_MAX_FEATURES}")
        self.features = self.our_features & _texts(features)
        outstanding = take_number(body, "max_outstanding", 1, 1 << 20, default=1)
        self.their_limit = min(self.their_limit, outstanding)
        self.their_message_bytes = take_number(
            body, "max_message_bytes", MIN_MESSAGE_BYTES, 1 << 40, default=MAX_REQUEST_BYTES
        )

    def _new_tag(self) -> int:
        while True:
            self._last_tag = self._last_tag % MAX_TAG + 1
            if self._last_tag not in self._ours:
                self._ours.add(self._last_tag)
                return self._last_tag


def _texts(features: Iterable[object]) -> frozenset[str]:
    return frozenset(one for one in features if isinstance(one, str))
