# SPDX-License-Identifier: Apache-2.0
"""A mapping that follows its guest to another backend, by a thread in C (follow.c).

When the backend sends {"event": "moved"}, the thread opens the image at the target and replaces the
old frames by the target's. Where nothing can be mapped, the memory is given up and the disk goes on
by bytes. The same thread notices that the backend is gone for good: from then on absent pages are
SIGBUS, and no access waits for them (orphan.c).
"""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cowshed.cache._core import ffi, lib
from cowshed.cache.errors import PeerError, UsageError
from cowshed.transport.guest.byte_disk import REQUEST_SECONDS, ByteDisk
from cowshed.transport.guest.network_disk import open_by_bytes
from cowshed.transport.messages.fields import MovedError

if TYPE_CHECKING:
    from cowshed.cache._core import StructFollower
    from cowshed.transport.guest.attach import Attached
    from cowshed.transport.messages.protocol import Body

__all__ = ["Following"]

_MAX_MOVES: Final = 4
_PAUSE_SECONDS: Final = 0.05


@dataclass(frozen=True, slots=True)
class _Place:
    """The backend that has the guest, or to which it moves."""

    uri: str
    token: str
    generation: str
    extent_bytes: int
    nr_moves: int
    why: str


class Following:
    """Follows from construction to stop() or forget(). For any thread.

    Invariant: the region and the connection's descriptor outlive _follower.
    """

    def __init__(
        self, attached: Attached, connection_fd: int, request: Body, *, follows: bool = True
    ) -> None:
        """Start the thread; attached and connection_fd are borrowed, request opened the image.

        Unless follows, the thread only notices that the backend is gone for good. Raises UsageError
        if no thread can be started.
        """
        self._image: Final[str] = request["image"]
        self._guest: Final = attached.guest
        self._lock = threading.RLock()
        self._far: ByteDisk | None = None
        fields = {
            "op": "open",
            "image": self._image,
            "guest": self._guest,
            "moved": True,  # the target must have the guest's pages, or refuse
            "window_bytes": request.get("window_bytes"),
            "write_window_bytes": request.get("write_window_bytes"),
        }
        opening = json.dumps(fields).removesuffix("}").encode()
        follower = ffi.new("struct follower **")
        err = lib.follower_start(
            attached.region,
            connection_fd,
            follows,
            self._guest.encode(),
            opening,
            attached.digest.encode(),
            follower,
        )
        if err < 0:
            raise UsageError(
                f"cannot start a thread to listen to the backend of guest {self._guest!r} "
                f"({os.strerror(-err)}); allow more (ulimit -u)"
            )
        self._follower: StructFollower | None = follower[0]

    def stop(self) -> None:
        """Stop following; the region stays as it is. Idempotent."""
        with self._lock:
            follower, self._follower = self._follower, None
            if follower is not None:
                lib.follower_stop(follower)
            far, self._far = self._far, None
        if far is not None:
            far.close()

    def forget(self) -> None:
        """In a forked child, which has no copy of the thread: drop it."""
        self._lock = threading.RLock()
        follower, self._follower = self._follower, None
        if follower is not None:
            lib.follower_forget(follower)

    @property
    def goes_by_bytes(self) -> bool:
        """Whether the guest is at a backend from which nothing can be mapped."""
        follower = self._follower
        return follower is not None and lib.follower_state(follower) == lib.FOLLOW_BYTES

    @property
    def place(self) -> _Place | None:
        """Where the guest is, if it has moved; its target, if it is moving; else None."""
        status = ffi.new("struct follow_status *")
        with self._lock:
            if self._follower is None:
                return None
            lib.follower_read(self._follower, status)
        uri = ffi.string(status.uri).decode()
        if not uri:
            return None
        token = ffi.string(status.token).decode()
        return _Place(
            uri=uri,
            token=json.loads(token),
            generation=ffi.string(status.generation).decode(),
            extent_bytes=status.extent_bytes,
            nr_moves=status.nr_moves,
            why=ffi.string(status.why).decode(errors="replace"),
        )

    @property
    def moving(self) -> str:
        """Where the guest moves and what that waits for, as text; "" if it does not move."""
        follower, place = self._follower, self.place
        if follower is None or place is None or lib.follower_state(follower) != lib.FOLLOW_MOVES:
            return ""
        return f"moving to {place.uri}" + (f": {place.why}" if place.why else "")

    def begin_view(self) -> None:
        """Count a view of the memory. UsageError if the memory was given up."""
        with self._lock:
            if self._follower is not None and lib.follower_begin_view(self._follower) < 0:
                place = self.place
                where = place.uri if place else "another backend"
                raise UsageError(
                    f"disk {self._image!r} has no view any more: guest {self._guest!r} moved to "
                    f"{where}, where pages cannot be mapped; use read and write"
                )

    def end_view(self) -> None:
        """Uncount a view."""
        with self._lock:
            if self._follower is not None:
                lib.follower_end_view(self._follower)

    def far(self) -> ByteDisk:
        """The disk by bytes, at the guest's backend; opened once. Raises as Backend.open does."""
        with self._lock:
            if self._far is None:
                place = self.place
                if place is None:
                    raise UsageError(f"disk {self._image!r} is closed; open it again")
                self._far = self._open(place.uri, place.token)
            return self._far

    def _open(self, uri: str, token: str) -> ByteDisk:
        """Open at the backend that has the guest. It may be starting or being succeeded.

        Tries for as long as an operation of an open disk does.
        """
        deadline = time.monotonic() + REQUEST_SECONDS
        while True:
            try:
                return self._open_once(uri, token)
            except PeerError:
                if time.monotonic() + _PAUSE_SECONDS > deadline:
                    raise
            time.sleep(_PAUSE_SECONDS)

    def _open_once(self, uri: str, token: str) -> ByteDisk:
        request = {"image": self._image, "guest": self._guest, "token": token}
        for _ in range(_MAX_MOVES):
            try:
                return open_by_bytes(uri, request)
            except MovedError as error:
                if not error.uri:
                    raise
                uri = error.uri
        return open_by_bytes(uri, request)
