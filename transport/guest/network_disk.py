# SPDX-License-Identifier: Apache-2.0
"""The guest's handshake over a network: hello, open, data; then NBD requests.

    hello, open {image, guest, token, ...} -> {mapped: false, size_bytes, overlay, ...}
    data -> the connection is in NBD's transmission phase, structured replies, on this guest's bytes

A guest that was redirected names the pages it had (open's overlay): a backend without them refuses
instead of starting with none. By the token a new connection proves that it is the same guest; the
token gives access to the guest's private pages.
"""

from __future__ import annotations

import os
import time
from functools import partial
from typing import Any, Final

from cowshed.cache.errors import CapacityError, UsageError
from cowshed.transport.channels.exchange import again_if_gone, ask, greet_asking, reply_to
from cowshed.transport.guest.byte_disk import READAHEAD_BYTES, REQUEST_SECONDS, ByteDisk, Dialled
from cowshed.transport.links.relay import Relay
from cowshed.transport.links.schemes import scheme
from cowshed.transport.links.stream import StreamConnection
from cowshed.transport.messages.fields import MovedError, take_number, take_text
from cowshed.transport.messages.protocol import Body

__all__ = ["open_by_bytes"]

_HANDSHAKE_SECONDS: Final = 10.0
_PAUSE_SECONDS: Final = 0.05
_MOVES_AT_ONCE: Final = 4


class _FullError(CapacityError):
    """The backend has no room for another connection."""


def open_by_bytes(
    uri: str,
    request: Body,
    timeout: float = REQUEST_SECONDS,
    readahead_bytes: int = READAHEAD_BYTES,
) -> ByteDisk:
    """Open an image as request says; the disk makes its own connections, one at a time.

    Raises UsageError, CapacityError or SourceError as the backend refuses, PeerError if it is gone.
    """
    read_only = bool(request.get("read_only"))  # the backend charges what is written, and no more
    fields = {
        name: value for name, value in request.items() if value is not None and name != "read_only"
    }
    fields |= {"token": request.get("token") or os.urandom(16).hex()}
    fields |= {"keep": request.get("token") is not None}

    here, is_open, overlay = uri, False, ""

    def dial(timeout: float) -> Dialled:
        nonlocal here, is_open, overlay
        began = time.monotonic()
        deadline = began + timeout
        nr_moves = 0
        sender = ""
        while True:
            # The successor of a backend that died in a drain redirects the guest before it knows
            # whether the guest's pages are at the target. So ask the target for these very pages,
            # and return to the sender if it has none; accept others once half the time is over.
            is_sure = not (sender and overlay) or time.monotonic() - began > timeout / 2
            wanted = {} if is_sure else {"overlay": overlay}
            try:
                # If the backend dies meanwhile, ask its successor at once.
                dialled = again_if_gone(partial(_dial, here, fields | wanted, deadline))
                is_open, overlay = True, dialled.overlay
                return dialled
            except MovedError as error:
                # The caller follows a redirect of the first open; later ones are followed here.
                if not is_open or not error.uri or scheme(error.uri).maps:
                    raise
                sender, here = here, error.uri
                nr_moves += 1
                # The guest is there already, so do not pause; but two backends may redirect it to
                # each other for ever.
                if nr_moves <= _MOVES_AT_ONCE:
                    continue
            except CapacityError as error:
                # The backend may not have noticed the end of our last connection, or has no room:
                # a disk that is open waits for either.
                if isinstance(error, _FullError) and not is_open:
                    raise
                if time.monotonic() + _PAUSE_SECONDS > deadline:
                    raise
                if wanted:
                    sender, here = "", sender
            time.sleep(_PAUSE_SECONDS)

    return ByteDisk(
        dial,
        request["image"],
        request["guest"],
        origin=uri.partition("?")[0],
        timeout=timeout,
        readahead_bytes=readahead_bytes,
        read_only=read_only,
    )


def _dial(uri: str, fields: Body, deadline: float) -> Dialled:
    try:
        # Together: after a drain or a restart many guests connect at once.
        connection, tag = greet_asking(uri, "open", fields, _left(deadline))
    except CapacityError as error:
        raise _FullError(str(error)) from error
    try:
        reply = reply_to(connection, "open", tag, _left(deadline))
        dialled: dict[str, Any] = {
            "size_bytes": take_number(reply, "size_bytes", minimum=1),
            "extent_bytes": take_number(reply, "extent_bytes", minimum=512),
            "digest": take_text(reply, "digest", default=""),
            "generation": take_text(reply, "generation", default=""),
            "overlay": take_text(reply, "overlay", default=""),
        }
        if reply.get("mapped") is not False or not isinstance(connection, StreamConnection):
            raise UsageError(f"the backend at {connection.peer_name} serves no bytes here")
        ask(connection, "data", {}, timeout=_left(deadline))
        sock, tls = connection.take_stream()
    finally:
        connection.close()
    if tls is not None:
        sock = Relay(sock, tls, handshake_seconds=_HANDSHAKE_SECONDS).inner
    return Dialled(sock=sock, **dialled)


def _left(deadline: float) -> float:
    return max(0.05, deadline - time.monotonic())
