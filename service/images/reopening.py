# SPDX-License-Identifier: Apache-2.0
"""Reopen images' sources for guests, in threads, so that the loop never waits for a file system."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cowshed.cache import CapacityError, CowshedError, Image, SourceError
from cowshed.transport.links.no_room import start_thread

__all__ = ["Reopened", "Reopener"]


@dataclass(frozen=True)
class Reopened:
    """A new descriptor of a source, owned by the receiver, and the file's device and inode."""

    fd: int
    device: int
    inode: int


OnDone = Callable[[Reopened | CowshedError], None]


class Reopener:
    """One thread for each image with requests; post(call) has the loop call call().

    reopen() is for the loop.

    Invariant: an image is in _waiting while its thread lives, with the requests not begun yet.
    """

    def __init__(self, post: Callable[[Callable[[], None]], None]) -> None:
        self._post: Final = post
        self._lock: Final = threading.Lock()
        self._waiting: dict[Image, deque[OnDone]] = {}

    def reopen(self, image: Image, on_done: OnDone) -> None:
        """Open a source again; calls on_done with the result, in the loop.

        on_done must close the descriptor if it is no longer needed. The result is a CapacityError
        if no thread can be started.
        """
        with self._lock:
            if (waiting := self._waiting.get(image)) is not None:
                waiting.append(on_done)
                return
            self._waiting[image] = deque([on_done])
        thread = threading.Thread(target=self._run, args=(image,), name="reopener", daemon=True)
        try:
            start_thread(thread)
        except CapacityError as error:
            with self._lock:
                del self._waiting[image]
            failed = error
            self._post(lambda: on_done(failed))

    def _run(self, image: Image) -> None:
        while True:
            with self._lock:
                if not self._waiting[image]:
                    del self._waiting[image]
                    return
                on_done = self._waiting[image].popleft()
            done = _reopen(image)
            self._post(lambda on_done=on_done, done=done: on_done(done))  # type: ignore[misc]


def _reopen(image: Image) -> Reopened | CowshedError:
    try:
        fd = image.source.reopen()
    except CowshedError as error:
        return error
    try:
        status = os.fstat(fd)
    except OSError as error:
        os.close(fd)
        return SourceError(f"cannot stat the source of image {image.label!r}: {error}")
    return Reopened(fd, status.st_dev, status.st_ino)
