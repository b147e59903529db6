# SPDX-License-Identifier: Apache-2.0
"""The table of URI schemes: how to connect and to listen by each.

Another transport (`xen:`, with grant tables and event channels; 9P) is one more row, whose
functions return a Connection and an AnyListener.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, Self

from cowshed.cache.errors import UsageError
from cowshed.transport.links import stream_ends, unix
from cowshed.transport.links.addresses import scheme_of
from cowshed.transport.links.connection import Connection
from cowshed.transport.links.unix import CONNECT_SECONDS

__all__ = ["SCHEMES", "AnyListener", "Scheme", "connect_raw", "listen", "scheme"]


class AnyListener(Protocol):
    """A listener of any scheme."""

    def __enter__(self) -> Self:
        """Return itself."""

    def __exit__(self, *_: object) -> None:
        """Stop listening."""

    @property
    def uri(self) -> str:
        """The URI to connect to, with the port that the kernel chose."""

    def fileno(self) -> int:
        """Return the descriptor to watch for reading, -1 once closed."""

    def accept(self) -> Connection | None:
        """Accept a waiting peer; None if none waits. Never blocks."""

    def accept_any(self) -> Connection | None:
        """Like accept, but also return a peer that must be refused, with no_room set."""

    def refill(self) -> None:
        """Refill the reserve of descriptors, after a refused peer was closed."""

    def close(self) -> None:
        """Stop listening. Idempotent."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How to reach a peer by one scheme; maps: descriptors travel, so images can be mapped."""

    connect: Callable[[str, float], Connection]
    listen: Callable[[str], AnyListener]
    maps: bool


SCHEMES: Final[dict[str, Scheme]] = {
    "unix": Scheme(unix.connect, unix.listen, maps=True),
    "tcp": Scheme(stream_ends.connect, stream_ends.listen, maps=False),
    "tls": Scheme(stream_ends.connect, stream_ends.listen, maps=False),
    "vsock": Scheme(stream_ends.connect, stream_ends.listen, maps=False),
}


def scheme(uri: str) -> Scheme:
    """Return the row of a URI's scheme; UsageError if there is none."""
    name = scheme_of(uri)
    if name not in SCHEMES:
        known = ", ".join(f"{one}:" for one in SCHEMES)
        raise UsageError(f"cannot use {uri!r}: no scheme {name + ':'!r}; there are {known}")
    return SCHEMES[name]


def connect_raw(uri: str, timeout: float = CONNECT_SECONDS) -> Connection:
    """Connect, sending no hello. UsageError for a bad URI, PeerError if nobody listens there."""
    return scheme(uri).connect(uri, timeout)


def listen(uri: str) -> AnyListener:
    """Listen at a URI of any scheme; UsageError if that fails."""
    return scheme(uri).listen(uri)
