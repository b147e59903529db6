# SPDX-License-Identifier: Apache-2.0
"""Connect to the target of a handoff, by any scheme."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from typing import Final

from cowshed.cache.errors import PeerError, UsageError
from cowshed.service.migration.link import SocketLink
from cowshed.transport.channels.exchange import ask, greet
from cowshed.transport.links.relay import Relay
from cowshed.transport.links.schemes import scheme
from cowshed.transport.links.stream import StreamConnection

__all__ = ["REPLY_SECONDS", "dial_target"]

REPLY_SECONDS: Final = 15.0


def dial_target(
    uri: str, look: Callable[[], None], reply_seconds: float = REPLY_SECONDS
) -> SocketLink:
    """Connect to the target of a handoff; the link is ready for the first section.

    The target may take reply_seconds to greet us, and as long again to accept the handoff. Raises
    UsageError for an unusable uri, or a target that refuses us; PeerError if none answers.
    """
    look()
    try:
        connection = greet(uri, reply_seconds)
    except PeerError as error:
        where = uri.partition("?")[0]
        raise PeerError(str(error) if where in str(error) else f"{where}: {error}") from error
    try:
        if scheme(uri).maps:
            ours, theirs = socket.socketpair()
            with theirs, contextlib.ExitStack() as undo:
                undo.callback(ours.close)
                ask(connection, "handoff", {}, [theirs.fileno()], reply_seconds)
                undo.pop_all()
            return SocketLink(ours, look, with_it=connection.close)
        ask(connection, "handoff", {}, timeout=reply_seconds)
        if not isinstance(connection, StreamConnection):
            raise UsageError(f"{uri} carries no handoff")
        sock, tls = connection.take_stream()
        if tls is not None:
            sock = Relay(sock, tls, handshake_seconds=0).inner
        return SocketLink(sock, look, is_relayed=tls is not None)
    except BaseException:
        connection.close()
        raise
