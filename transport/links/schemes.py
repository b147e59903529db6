# SPDX-License-Identifier: Apache-2.0
"""The schemes a URI may have, and how one connects and listens by each: a table to add to.

Room is left for `xen:` (grant tables and event channels) and for a 9P face: each is one more row
whose ends give a Connection and a Listener of this shape.
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
    """What listens, by whatever scheme."""

    def __enter__(self) -> Self:
        """Give itself."""

    def __exit__(self, *_: object) -> None:
        """Stop listening."""

    @property
    def uri(self) -> str:
        """Where one connects to it, with the port that the kernel chose."""

    def fileno(self) -> int:
        """Give the descriptor to watch for reading, -1 once closed."""

    def accept(self) -> Connection | None:
        """Take a peer that waits, without waiting; None if there is none."""

    def accept_any(self) -> Connection | None:
        """Take a peer likewise, even one that there is no room for: its no_room says why."""

    def refill(self) -> None:
        """A peer without room is closed: have its descriptor for the next one."""

    def close(self) -> None:
        """Stop listening; nothing twice."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How to reach a peer by one kind of URI; maps tells whether descriptors travel."""

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
    """Give the row of a URI's scheme; UsageError if there is none."""
    name = scheme_of(uri)
    if name not in SCHEMES:
        known = ", ".join(f"{one}:" for one in SCHEMES)
        raise UsageError(f"cannot use {uri!r}: no scheme {name + ':'!r}; there are {known}")
    return SCHEMES[name]


def connect_raw(uri: str, timeout: float = CONNECT_SECONDS) -> Connection:
    """Connect, and say nothing yet. Raises UsageError for the URI, PeerError if nobody answers."""
    return scheme(uri).connect(uri, timeout)


def listen(uri: str) -> AnyListener:
    """Listen at a URI of any scheme; UsageError if this cannot be."""
    return scheme(uri).listen(uri)
