# SPDX-License-Identifier: Apache-2.0
"""A conversation between two programs, without a socket: messages in, events out.

    connecting:  NEW --hello sent--> GREETING --its reply--> OPEN --end--> GONE
    accepting:   NEW --hello came, reply due--> OPEN --end--> GONE

Then either side may ask the other, and answer in any order. A request has "op" and a tag of its
sender's choosing; what answers it has "ok" and the same tag: any number of replies with "progress",
then one without. The two directions' tags have nothing to do with each other.

A request that is out of turn, a reply to nothing, a tag in use, and more requests unanswered than
was agreed, are the peer's errors: PeerError, which ends the conversation. Our own are UsageError,
and CapacityError for one request too many; those change nothing.
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
    """Where a conversation is; see the module's picture."""

    NEW = enum.auto()
    GREETING = enum.auto()
    OPEN = enum.auto()
    GONE = enum.auto()


@dataclass(frozen=True, slots=True)
class Greeted:
    """Both have said hello; reply, if any, is to be sent with tag."""

    tag: int
    reply: Body | None


@dataclass(frozen=True, slots=True)
class Asked:
    """The peer wants something; answer(tag) is owed."""

    tag: int
    body: Body


@dataclass(frozen=True, slots=True)
class Answer:
    """The peer answers our request of this tag; more follows unless it is the last."""

    tag: int
    body: Body
    last: bool


@dataclass
class Dialogue:
    """One side of a conversation.

    Invariants: (1) _ours, the requests of ours that wait, are at most their_limit; (2) _theirs,
    those of the peer's that we owe an answer, at most our_limit; (3) both are empty unless OPEN,
    but for our hello while GREETING.
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
        """Give the first message of the one who connected, and its tag."""
        if self.phase is not DialoguePhase.NEW:
            raise UsageError("hello has been said")
        tag = self._new_tag()
        self.phase = DialoguePhase.GREETING
        return tag, {"op": "hello", **self._introduction()}

    def ask(self) -> int:
        """Give the tag for a request of ours; UsageError before hello and after the end."""
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
        """Take back an ask() whose request could not be sent."""
        self._ours.discard(tag)

    def answer(self, tag: int, body: Body) -> None:
        """Note that the peer's request of this tag is answered with body."""
        if tag not in self._theirs:
            raise UsageError(f"no request with tag {tag} waits for an answer")
        if "progress" not in body:
            self._theirs.remove(tag)

    def end(self) -> None:
        """The connection has ended; nothing waits any more."""
        self.phase = DialoguePhase.GONE
        self._ours.clear()
        self._theirs.clear()

    def take(self, tag: int, body: Body) -> Greeted | Asked | Answer:
        """Take a message that came; say what it is."""
        if "op" in body:
            return self._take_request(tag, body)
        if tag not in self._ours:
            raise PeerError(f"an answer with tag {tag} came, and no request waits for it")
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
            raise PeerError(f"request {op!r} has tag {tag}, which waits for an answer already")
        if len(self._theirs) >= self.our_limit:
            raise PeerError(
                f"{len(self._theirs)} requests came unanswered; {self.our_limit} at most"
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
