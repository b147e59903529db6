# SPDX-License-Identifier: Apache-2.0
"""The guest's interface: connect to a backend, open images, read them and write a private copy.

    with connect("unix:///run/cowshed/cowshed.sock") as backend:
        with backend.open("debian", guest="g1", quota_bytes=64 << 20) as disk:
            disk.write(0, b"mine")

A forked child must connect for itself: the objects it inherits refuse use.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Final

from cowshed.cache.errors import PeerGoneError, UsageError
from cowshed.transport.channels.exchange import again_if_gone, ask_stream, close_all, greet
from cowshed.transport.guest.byte_disk import READAHEAD_BYTES, REQUEST_SECONDS, ByteDisk
from cowshed.transport.guest.disk import Disk
from cowshed.transport.guest.forks import forget_in_child
from cowshed.transport.guest.network_disk import open_by_bytes
from cowshed.transport.links.schemes import scheme
from cowshed.transport.messages.fields import MovedError, check_reply
from cowshed.transport.messages.protocol import Body

__all__ = ["Backend", "ByteDisk", "Disk", "connect"]

# Read-only requests, safe to repeat.
_LOOKS: Final = frozenset({"status", "audit"})

_disk_numbers = itertools.count(1)

# Bounds the redirects of backends that send a guest to each other.
_MAX_MOVES: Final = 4


def connect(uri: str) -> Backend:
    """Connect to a backend and agree on the protocol.

    Raises UsageError for a uri that cannot be used, PeerError if no backend answers there.
    """
    return Backend(uri)


class Backend:
    """A connection to a backend; for any thread, and to open any number of disks."""

    def __init__(self, uri: str) -> None:
        self.uri: Final = uri
        self._lock = threading.Lock()
        self._forked = False
        self._connection = greet(uri)
        forget_in_child(self)

    def __enter__(self) -> Backend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether the backend still holds its end of the connection."""
        return self._connection.alive

    def close(self) -> None:
        """End the connection; disks that were opened have their own and stay open."""
        self._connection.close()

    def forget(self) -> None:
        """In a forked child: close the copy of the socket."""
        self._forked = True
        self._lock = threading.Lock()
        self._connection.close()

    def request(self, op: str, **fields: Any) -> Body:
        """Send one request and return its reply, dropping progress reports.

        If the backend dies meanwhile, read-only requests are repeated to its successor. Raises the
        error that the backend's refusal stands for (UsageError, CapacityError, SourceError), and
        PeerError, which closes the connection, if it is gone, silent or sends a malformed reply.
        """
        if op in _LOOKS:
            return again_if_gone(lambda: self._request_anew(op, fields))
        return self._request(op, fields)

    def _request_anew(self, op: str, fields: dict[str, Any]) -> Body:
        try:
            return self._request(op, fields)
        except PeerGoneError:
            with self._lock:
                self._connection = greet(self.uri)
            raise

    def _request(self, op: str, fields: dict[str, Any]) -> Body:
        for reply in self.stream(op, **fields):
            if "progress" not in reply:
                return reply
        raise AssertionError("a stream ends with a reply")

    def stream(self, op: str, *, fds: Sequence[int] = (), **fields: Any) -> Iterator[Body]:
        """Like request, but yield each progress report as it comes, then the reply.

        fds go with the request, and stay the caller's. Other threads wait until the reply; leaving
        early closes the connection.
        """
        with self._lock:
            if self._connection.fileno() < 0:
                raise UsageError(
                    f"the connection to {self.uri} was made before a fork; connect again here"
                    if self._forked
                    else f"the connection to {self.uri} is closed; connect again"
                )
            for body, reply_fds in ask_stream(self._connection, op, fields, fds):
                close_all(reply_fds)
                yield check_reply(body)

    def open(
        self,
        image: str,
        guest: str | None = None,
        quota_bytes: int | None = None,
        on_quota: str | None = None,
        window_bytes: int | None = None,
        write_window_bytes: int | None = None,
        token: str | None = None,
        timeout: float = REQUEST_SECONDS,
        readahead_bytes: int = READAHEAD_BYTES,
        follow_moves: bool = True,
        read_only: bool = False,
    ) -> Disk | ByteDisk:
        """Open an image as a guest of its own; None leaves a choice to the backend.

        Over unix:// the image is mapped. Over a network it is read and written by bytes
        (byte_disk.py): a call fails timeout seconds after the backend last sent anything, and
        sequential reads are read ahead by readahead_bytes. The windows apply to a mapping only;
        timeout and readahead_bytes to a network only.

        guest is its name; None: a unique name made from this process. Further opens with the same
        token, if there is one, are the same guest: more mappings under one quota, or a later open
        over a network, which finds its private pages. At quota_bytes of private pages the backend
        does what on_quota says: "stop" the writer, "kill" it, or "allow" and count.

        read_only: the disk is not written; write() is a UsageError and the view is read-only. Then
        no quota bounds what the kernel may map without asking the backend.

        A backend that is being drained, or was, replies with the URI of the backend that has its
        guests now: the image is opened there, and an open disk follows its guest by a thread of its
        own (disk.py). With follow_moves False the reply is a MovedError, and a disk does not
        follow.

        Raises as request does, and UsageError if this process cannot have the page faults it needs.
        """
        request: Body = {
            "image": image,
            "guest": guest,
            "quota_bytes": quota_bytes,
            "on_quota": on_quota,
            "token": token,
        }
        if read_only:
            request["read_only"] = True
        windows = {"window_bytes": window_bytes, "write_window_bytes": write_window_bytes}
        uri = self.uri
        for _ in range(_MAX_MOVES if follow_moves else 0):
            try:
                return _open_at(uri, request, windows, timeout, readahead_bytes, follow=True)
            except MovedError as error:
                if not error.uri:
                    raise
                uri = error.uri
        return _open_at(uri, request, windows, timeout, readahead_bytes, follow=follow_moves)


def _open_at(
    uri: str,
    request: Body,
    windows: Body,
    timeout: float,
    readahead_bytes: int,
    *,
    follow: bool = False,
) -> Disk | ByteDisk:
    if not scheme(uri).maps:
        request = {**request, "guest": request["guest"] or _fresh_name()}
        return open_by_bytes(uri, request, timeout, readahead_bytes)
    return again_if_gone(lambda: Disk(greet(uri), {**request, **windows}, uri, follow=follow))


def _fresh_name() -> str:
    # Different hosts use the same pids.
    return f"{socket.gethostname()[:32]}-pid-{os.getpid()}-{next(_disk_numbers)}"
