# SPDX-License-Identifier: Apache-2.0
"""One guest's session over a network, until its data phase.

    NEW --hello--> IDLE --open--> OPENED --data--> GIVEN (the C core's threads have the socket)
                   IDLE: describe             any but GIVEN: --close--> CLOSED
                   IDLE --handoff--> GIVEN (a thread of service/migration/handoff_target.py has it)

As in sessions.py, an invalid request costs the peer its connection, and a valid one that cannot be
met is refused. Operators' requests are for the unix socket, where the kernel reports the user.
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

# From connecting until data flows.
_HANDSHAKE_SECONDS: Final = 30.0


class NetworkState(enum.Enum):
    """The state of a session; the module's docstring has the transitions."""

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
    """A guest that a session entered; keep: its private pages outlive an orderly end."""

    guest: OverlayGuest
    keep: bool


class NetworkHost(Protocol):
    """The part of the server that a session uses."""

    def find_image(self, name: str, identity: Identity) -> Image:
        """Return the image of that name; UsageError naming those the guest may use."""

    def identity(self, names: list[str]) -> Identity:
        """Return the identity of a certificate's names; UsageError if they conflict."""

    def enter(
        self,
        client: Entering,
        image: Image,
        name: str,
        claim: Claim,
        quota_bytes: int | None,
        policy: QuotaPolicy | None,
    ) -> OverlayGuest:
        """Enter a guest's overlay as its only client; UsageError if it is another owner's.

        CapacityError if it has another client. NotYetError as in Entrance.enter().
        """

    def check_pages(self, image: Image, name: str, overlay_id: str) -> None:
        """Raise CapacityError if the guest's private pages are not here; makes none."""

    def overlay_id(self, guest: OverlayGuest) -> str:
        """Return the identifier of the guest's private pages; it differs if they are made anew."""

    def check_handoff(self, client_name: str | None, scheme: str) -> None:
        """Raise UsageError unless this peer may hand guests over to us."""

    def leave(self, entered: Entered, *, was_orderly: bool) -> None:
        """Leave what was entered. was_orderly: the guest closed and needs it no more."""


class NetworkSession:
    """The backend's half of one connection; end() releases whatever it has."""

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
        """Whether the data phase begins once the reply is sent."""
        return self._state is NetworkState.GIVEN

    @property
    def has_more(self) -> bool:
        """Whether messages follow the request that waits; the caller must read no more then."""
        return len(self._unanswered) > 1

    @property
    def who(self) -> dict[str, object]:
        """The peer's fields in a log line."""
        client = {"client": self.connection.identity} if self.connection.identity else {}
        return {**client, "address": self.connection.where}

    def handle(self, message: Received) -> None:
        """Perform one request and queue the reply; PeerError ends the connection.

        A request that waits for its overlay, and those after it, are performed by go_on(), which
        the owner must call after on_made.
        """
        self._unanswered.append(message)
        if len(self._unanswered) == 1:
            self.go_on()

    def go_on(self) -> None:
        """Perform the requests that wait, up to the first that must wait on."""
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
        """Leave the guest, unless its data phase has begun, and close the connection."""
        self._entering.give_up()
        entered, self.entered = self.entered, None
        if entered is not None:
            # A guest that opened and never requested data has private pages only from before.
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
        """A guest is identified by its token; one with a certificate by both together."""
        proof = f"token {hashlib.sha256(token.encode()).hexdigest()[:32]}"
        client = self._identity.client_name
        # The token alone may identify it, if it connected by a transport without TLS before.
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
    """Return the key that a connection is counted under: its host."""
    return f"address {connection.where.partition('://')[2].rpartition(':')[0]}"
