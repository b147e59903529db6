# SPDX-License-Identifier: Apache-2.0
"""The client side of the protocol: a request, its progress reports, its reply."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

from cowshed.cache.errors import PeerError, PeerGoneError
from cowshed.transport.links.connection import Connection
from cowshed.transport.links.schemes import connect_raw
from cowshed.transport.links.unix import CONNECT_SECONDS
from cowshed.transport.messages.fields import check_reply, take_number
from cowshed.transport.messages.protocol import VERSION, Body

REPLY_SECONDS: Final = 60.0
_GREETINGS: Final = 3
_TRIES: Final = 5

_Answer = TypeVar("_Answer")


def greet(uri: str, timeout: float = REPLY_SECONDS) -> Connection:
    """Connect and agree on the version; the connection is the caller's.

    If the backend dies meanwhile, its successor listens at the same socket, so this tries again.
    Raises UsageError for a URI that cannot be used, PeerError if no cowshed backend answers there.
    """
    return _greet(uri, timeout, None)[0]


def greet_asking(
    uri: str, op: str, fields: Mapping[str, Any], timeout: float = REPLY_SECONDS
) -> tuple[Connection, int]:
    """Like greet(), and send a first request along, so that both take one round trip.

    Returns the request's tag: the caller must call reply_to() next.
    """
    return _greet(uri, timeout, {"op": op, **fields})


def _greet(uri: str, timeout: float, first: Body | None) -> tuple[Connection, int]:
    deadline = time.monotonic() + timeout
    for _ in range(_GREETINGS - 1):
        with contextlib.suppress(_DiedError):
            return _greet_once(uri, max(0.05, deadline - time.monotonic()), first)
    return _greet_once(uri, max(0.05, deadline - time.monotonic()), first)


class _DiedError(PeerError):
    """hello failed: the peer closed the connection, was silent or sent a malformed reply."""


def _greet_once(uri: str, timeout: float, first: Body | None) -> tuple[Connection, int]:
    connection = connect_raw(uri, min(timeout, CONNECT_SECONDS))
    try:
        tag = connection.queue({"op": "hello", "version": VERSION, "features": []})
        first_tag = tag if first is None else connection.queue(first)
        try:
            reply = reply_to(connection, "hello", tag, timeout)
        except PeerGoneError as error:
            raise _DiedError(
                f"the backend at {uri.partition('?')[0]} closed the connection before it replied: "
                "it is shutting down, or refused us; see its log"
            ) from error
        except PeerError as error:
            raise _DiedError(str(error)) from error
        version = take_number(reply, "version")
        if version != VERSION:
            raise PeerError(f"the backend at {uri} speaks version {version}, we speak {VERSION}")
    except BaseException:
        connection.close()
        raise
    return connection, first_tag


def ask(
    connection: Connection,
    op: str,
    fields: Mapping[str, Any],
    fds: Sequence[int] = (),
    timeout: float = REPLY_SECONDS,
) -> Body:
    """Send one request and return the reply; raises the error that a refusal stands for.

    Raises PeerError, and closes the connection, if the backend is gone, silent for timeout seconds
    or sends a malformed reply.
    """
    reply, reply_fds = ask_for_fds(connection, op, fields, fds, timeout)
    close_all(reply_fds)
    return reply


def ask_for_fds(
    connection: Connection,
    op: str,
    fields: Mapping[str, Any],
    fds: Sequence[int] = (),
    timeout: float = REPLY_SECONDS,
) -> tuple[Body, list[int]]:
    """Like ask, but also return the reply's descriptors, which are then the caller's."""
    return _the_reply(ask_stream(connection, op, fields, fds, timeout))


def reply_to(connection: Connection, op: str, tag: int, timeout: float = REPLY_SECONDS) -> Body:
    """Send what is queued, and return the reply to the request with that tag, as ask() does."""
    reply, reply_fds = _the_reply(_replies(connection, op, tag, timeout))
    close_all(reply_fds)
    return reply


def _the_reply(replies: Iterator[tuple[Body, list[int]]]) -> tuple[Body, list[int]]:
    for body, reply_fds in replies:
        if "progress" in body:
            close_all(reply_fds)
            continue
        try:
            return check_reply(body), reply_fds
        except BaseException:
            close_all(reply_fds)
            raise
    raise AssertionError("a stream ends with a reply")


def again_if_gone(call: Callable[[], _Answer]) -> _Answer:
    """Make a call that connects and asks; repeat it, a few times, if the backend dies meanwhile.

    The repeated call reaches the successor, if there is one; else its connect fails.
    """
    for _ in range(_TRIES - 1):
        with contextlib.suppress(PeerGoneError):
            return call()
    return call()


def ask_stream(
    connection: Connection,
    op: str,
    fields: Mapping[str, Any],
    fds: Sequence[int] = (),
    timeout: float = REPLY_SECONDS,
) -> Iterator[tuple[Body, list[int]]]:
    """Send a request; yield each progress report, then the reply, unchecked, each with its fds.

    Closes the connection if anything fails or the caller stops before the reply.
    """
    yield from _replies(connection, op, connection.queue({"op": op, **fields}, fds), timeout)


def _replies(
    connection: Connection, op: str, tag: int, timeout: float
) -> Iterator[tuple[Body, list[int]]]:
    finished = False
    try:
        with contextlib.suppress(PeerGoneError):  # the peer may have sent why before it closed
            connection.drain(timeout)
        while not finished:
            body, reply_fds, reply_tag = connection.recv(timeout)
            if reply_tag == 0 and body.get("ok") is False:
                reply_tag = tag  # a backend without room refuses before it has read a tag
            if reply_tag < tag:
                # A successor cannot know whether its predecessor's reply reached us: it sends the
                # reply again.
                close_all(reply_fds)
                continue
            if reply_tag != tag:
                close_all(reply_fds)
                raise PeerError(f"the backend answered request {reply_tag} instead of {tag}")
            finished = "progress" not in body
            yield body, reply_fds
    except PeerGoneError as error:
        why = "the backend ended, or dropped us: see its log"
        raise PeerGoneError(f"{op}: {error}; {why}") from error
    except PeerError as error:
        raise type(error)(f"{op}: {error}; is the backend stopped, or overloaded?") from error
    finally:
        if not finished:
            connection.close()


def close_all(fds: list[int]) -> None:
    """Close these descriptors and empty the list."""
    while fds:
        os.close(fds.pop())
