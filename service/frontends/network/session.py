# SPDX-License-Identifier: Apache-2.0
"""One guest's conversation over a network, until its bytes flow.

    NEW --hello--> IDLE --open--> OPENED --data--> GIVEN (the C core's threads have the socket)
                   IDLE: describe             any but GIVEN: --close--> CLOSED
                   IDLE --handoff--> GIVEN (a thread of service/migration/handoff_target.py has it)

As in sessions.py, what makes no sense costs the peer its connection, and what cannot be met is
refused. Operators' requests are for the unix socket, where the kernel says who asks.
"""

from __future__ import annotations

import enum
import hashlib
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from cowshed.accounting import QuotaPolicy
from cowshed.cache import CowshedError, Image, PeerError
from cowshed.service.images.generations import image_generation
from cowshed.service.overlays.claims import Claim
from cowshed.service.overlays.entrance import Entering, NotYetError
from cowshed.service.overlays.overlays import OverlayGuest
from cowshed.service.runtime.test_points import reach
from cowshed.service.settings.domains import Identity
from cowshed.service.settings.quotas import check_quota
from cowshed.transport import Received
from cowshed.transport.links.stream import StreamConnection
from cowshed.transport.messages.fields import (
    error_reply,
    refusal,
    take_choice,
    take_number,
    take_optional_number,
    take_text,
)
from cowshed.transport.messages.protocol import VERSION, Body

__all__ = ["Entered", "NetworkHost", "NetworkSession"]

# From connecting until data flows; nobody needs to be here without a guest.
_HANDSHAKE_SECONDS: Final = 30.0


class NetworkState(enum.Enum):
    """Where a conversation is; see the module's picture."""

    NEW = enum.auto()
    IDLE = enum.auto()
    OPENED = enum.auto()
    GIVEN = enum.auto()
    CLOSED = enum.auto()


_NEXT: Final = {
    (NetworkState.NEW, "hello"): NetworkState.IDLE,
    (NetworkState.IDLE, "describe"): NetworkState.IDLE,
    (NetworkState.IDLE, "open"): NetworkState.OPENED,
    (NetworkState.OPENED, "data"): NetworkState.GIVEN,
    (NetworkState.IDLE, "handoff"): NetworkState.GIVEN,
    (NetworkState.IDLE, "close"): NetworkState.CLOSED,
    (NetworkState.OPENED, "close"): NetworkState.CLOSED,
}
_OPS: Final = frozenset(op for _, op in _NEXT)


@dataclass(frozen=True)
class Entered:
    """A guest that was let in: keep says whether its private pages outlive a good-bye."""

    guest: OverlayGuest
    keep: bool


class NetworkHost(Protocol):
    """What a session needs of its server."""

    def find_image(self, name: str, identity: Identity) -> Image:
        """The image that a guest means; UsageError naming those it may use."""

    def identity(self, names: list[str]) -> Identity:
        """Who has these names in its certificate; UsageError if they contradict."""

    def enter(
        self,
        client: Entering,
        image: Image,
        name: str,
        claim: Claim,
        quota_bytes: int | None,
        policy: QuotaPolicy | None,
    ) -> OverlayGuest:
        """Hold a guest's overlay for one client, the only one; UsageError if it is not its own.

        NotYetError as Entrance.enter() has it.
        """

    def check_pages(self, image: Image, name: str, overlay_id: str) -> None:
        """Refuse a guest whose private pages are not here: CapacityError, and none are made."""

    def overlay_id(self, guest: OverlayGuest) -> str:
        """Name these private pages: others, under the same guest's name, are named otherwise."""

    def check_handoff(self, client_name: str | None, scheme: str) -> None:
        """Refuse who may not give us guests: UsageError."""

    def leave(self, entered: Entered, *, was_orderly: bool) -> None:
        """Let go of what was entered. was_orderly: the guest said good-bye, and is done with it."""


class NetworkSession:
    """The backend's half of one connection; end() gives back whatever it holds."""

    def __init__(
        self,
        connection: StreamConnection,
        scheme: str,
        host: NetworkHost,
        on_made: Callable[[], None],
    ) -> None:
        self.connection: Final = connection
        self.scheme: Final = scheme
        self.deadline: Final = time.monotonic() + _HANDSHAKE_SECONDS
        self.entered: Entered | None = None
        self.brings_handoff = False
        self._host = host
        self._state = NetworkState.NEW
        self._identity = Identity()
        self._entering: Final = Entering(on_made)
        self._unanswered: deque[Received] = deque()  # the first of them waits for its overlay

    @property
    def closing(self) -> bool:
        """Whether only replies are left to send."""
        return self._state is NetworkState.CLOSED

    @property
    def given(self) -> bool:
        """Whether the guest's bytes are to flow once the reply is out."""
        return self._state is NetworkState.GIVEN

    @property
    def has_more(self) -> bool:
        """Whether something was said after the request that waits: no more is to be read then."""
        return len(self._unanswered) > 1

    @property
    def who(self) -> dict[str, object]:
        """The peer, for a log."""
        client = {"client": self.connection.identity} if self.connection.identity else {}
        return {**client, "address": self.connection.where}

    def handle(self, message: Received) -> None:
        """Do what one message asks and queue the reply; PeerError ends the connection.

        One that waits for its overlay, and what comes after it, is done in go_on(), after on_made.
        """
        self._unanswered.append(message)
        if len(self._unanswered) == 1:
            self.go_on()

    def go_on(self) -> None:
        """Do what is not done yet."""
        while self._unanswered:
            try:
                self._do(self._unanswered[0])
            except NotYetError:
                return
            self._unanswered.popleft()

    def _do(self, message: Received) -> None:
        op = take_text(message.body, "op", max_length=32)
        following = _NEXT.get((self._state, op))
        if following is None:
            if self._state is NetworkState.NEW:
                raise PeerError(f"the first request must be 'hello', not {op!r}")
            if op in _OPS:
                raise PeerError(f"request {op!r} does not fit here ({self._state.name.lower()})")
            why = f"{op!r} is not for the network; ask at the daemon's unix socket"
            self._reply(message.tag, error_reply("unknown", why))
            return
        try:
            reply = getattr(self, f"_on_{op}")(message.body)
        except PeerError:
            raise
        except CowshedError as error:
            self._reply(message.tag, refusal(error))
            return
        self._state = following
        self._reply(message.tag, {"ok": True, **reply})

    def end(self) -> None:
        """Let go of the guest, unless its bytes flow by now, and close the connection."""
        self._entering.give_up()
        entered, self.entered = self.entered, None
        if entered is not None:
            # Who opened and never asked for data has nothing here, unless it was here before.
            empty = entered.guest.account.status().private_pages == 0
            self._host.leave(entered, was_orderly=self.closing or empty)
        self.connection.close()

    def _on_hello(self, body: Body) -> Body:
        take_number(body, "version", minimum=1)
        self._identity = self._host.identity(self.connection.identities)
        return {"version": VERSION, "features": ["data"], "pid": os.getpid()}

    def _on_describe(self, body: Body) -> Body:
        return _describe(self._host.find_image(take_text(body, "image"), self._identity))

    def _on_open(self, body: Body) -> Body:
        reach("NETWORK_OPENS")
        image = self._host.find_image(take_text(body, "image"), self._identity)
        name = take_text(body, "guest", max_length=64)
        quota_bytes = take_optional_number(body, "quota_bytes")
        if quota_bytes is not None:
            check_quota(quota_bytes)
        policy = None
        if body.get("on_quota") is not None:
            policy = QuotaPolicy[take_choice(body, "on_quota", ("stop", "kill", "allow")).upper()]
        claim = self._claim(take_text(body, "token", max_length=64))
        if overlay_id := take_text(body, "overlay", default=""):
            self._host.check_pages(image, name, overlay_id)
        guest = self._host.enter(self._entering, image, name, claim, quota_bytes, policy)
        self.entered = Entered(guest, body.get("keep") is True)
        return {**_describe(image), "overlay": self._host.overlay_id(guest)}

    def _on_handoff(self, _: Body) -> Body:
        self._host.check_handoff(self._identity.client_name, self.scheme)
        self.brings_handoff = True
        return {}

    def _on_data(self, _: Body) -> Body:
        return {}

    def _on_close(self, _: Body) -> Body:
        return {}

    def _claim(self, token: str) -> Claim:
        """A guest is known by its token, and one with a certificate by both together."""
        proof = f"token {hashlib.sha256(token.encode()).hexdigest()[:32]}"
        client = self._identity.client_name
        # Its token alone may be what it is known by, if it came by another transport before.
        return Claim(
            owners=(f"client {client} {proof}", proof) if client else (proof,),
            counted_as=address_of(self.connection),
            is_operator=False,
            transport=self.scheme,
            proof=proof,
            has_certificate=client is not None,
        )

    def _reply(self, tag: int, body: dict[str, Any]) -> None:
        self.connection.queue(body, (), tag)


def _describe(image: Image) -> Body:
    return {
        "mapped": False,
        "size_bytes": image.size_bytes,
        "extent_bytes": image.extent_bytes,
        "digest": image.digest or None,
        "generation": image_generation(image),
    }


def address_of(connection: StreamConnection) -> str:
    """Whom a connection is counted for: its host."""
    return f"address {connection.where.partition('://')[2].rpartition(':')[0]}"
