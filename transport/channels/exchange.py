# SPDX-License-Identifier: Apache-2.0
"""The asking side of the protocol: a request, its progress reports, its reply."""

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

    A backend that dies as we come has a successor at the same socket, so that is asked too. Raises
    UsageError for a uri that cannot be used, PeerError if no backend of ours answers there.
    """
    deadline = time.monotonic() + timeout
    for _ in range(_GREETINGS - 1):
        with contextlib.suppress(_DiedError):
            return _greet_once(uri, max(0.05, deadline - time.monotonic()))
    return _greet_once(uri, max(0.05, deadline - time.monotonic()))


class _DiedError(PeerError):
    """The peer closed the connection before it said anything."""


def _greet_once(uri: str, timeout: float) -> Connection:
    connection = connect_raw(uri, min(timeout, CONNECT_SECONDS))
    try:
        try:
            reply = ask(connection, "hello", {"version": VERSION, "features": []}, timeout=timeout)
        except PeerGoneError as error:
            raise _DiedError(
                f"the backend at {uri.partition('?')[0]} hung up before it said anything: it is "
                "ending, or it turned us away; its log says which"
            ) from error
        except PeerError as error:
            raise _DiedError(str(error)) from error
        version = take_number(reply, "version")
        if version != VERSION:
            raise PeerError(f"the backend at {uri} speaks version {version}, we speak {VERSION}")
    except BaseException:
        connection.close()
        raise
    return connection


def ask(
    connection: Connection,
    op: str,
    fields: Mapping[str, Any],
    fds: Sequence[int] = (),
    timeout: float = REPLY_SECONDS,
) -> Body:
    """Ask for one thing and give the reply; raises what a refusal stands for.

    PeerError, for a backend that is gone, silent for timeout seconds or makes no sense, closes the
    connection.
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
    """Like ask, giving also the reply's descriptors, which are then the caller's."""
    for body, reply_fds in ask_stream(connection, op, fields, fds, timeout):
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
    """Make a call that connects and asks; again, a few times, if the backend dies meanwhile.

    Whoever it asks then is the successor, if there is one; else the connect fails.
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
    """Ask, and give each progress report as it comes, at last the reply, unchecked, with its fds.

    The connection is closed if anything goes wrong or the caller does not stay to the end.
    """
    tag = connection.queue({"op": op, **fields}, fds)
    finished = False
    try:
        with contextlib.suppress(PeerGoneError):  # it may have said why before it hung up
            connection.drain(timeout)
        while not finished:
            body, reply_fds, reply_tag = connection.recv(timeout)
            if reply_tag == 0 and body.get("ok") is False:
                reply_tag = tag  # it could not make out which request it has no room for
            if reply_tag < tag:
                # A successor cannot know whether we have its predecessor's reply: it said so again.
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
