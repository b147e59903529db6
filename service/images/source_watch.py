# SPDX-License-Identifier: Apache-2.0
"""Check images' sources periodically: whether they changed, were replaced, and still answer.

A source is identified by device, inode and size. If only its times change, its bytes are read again
and compared in the background, and only different bytes are an error.

A check may hang with its file system. So none runs in the loop, and one that hangs does not delay
the checks of other sources (runtime/side_threads.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Final

from cowshed.cache import Image
from cowshed.service.images.digests import digest_of
from cowshed.service.runtime.logs import EventLog
from cowshed.service.runtime.side_threads import SideThreads

__all__ = ["HUNG_SECONDS", "SourceWatch"]

_log = EventLog("cowshed")

# A check or read unanswered for this long counts as hung.
HUNG_SECONDS: Final = 3.0
# Comparing bytes takes at most about 1/10 of the time, however often times change.
_COMPARE_SHARE: Final = 10
_STOP_SECONDS: Final = 1.0


class SourceWatch:
    """Checks every image's source. look() is for the loop; all else is for any thread."""

    def __init__(self, images: Iterable[Image], side: SideThreads) -> None:
        """images is iterated anew at each look(), as images may be added."""
        self._images: Final = images
        self._side: Final = side
        self._hung: set[int] = set()
        self._lost: set[int] = set()
        self._stopping: Final = threading.Event()
        # By image_no: the mtime for which the bytes are known to be the same, and when bytes may be
        # compared again.
        self._written_ns: dict[int, int] = {}
        self._not_before: dict[int, float] = {}

    def stop(self) -> None:
        """Stop comparing bytes; checks that hang are left behind."""
        self._stopping.set()
        self._side.wait_all(_STOP_SECONDS)

    def look(self) -> None:
        """Start a check of every source, and log those that hang or answer again."""
        for image in self._images:
            waits = self.waiting_seconds(image)
            if waits >= HUNG_SECONDS and image.image_no not in self._hung:
                self._hung.add(image.image_no)
                _log.error(
                    "source-hangs",
                    "its file system does not answer: only guests of this image wait",
                    image=image.label,
                    source=image.source.path,
                )
            elif waits < HUNG_SECONDS and image.image_no in self._hung:
                self._hung.discard(image.image_no)
                _log.notice("source-answers", "its guests continue", image=image.label)
            self._side.run(_key(image), lambda image=image: self._look_at(image))  # type: ignore[misc]

    def waiting_seconds(self, image: Image) -> float:
        """How long the oldest unanswered check or read of a source has taken."""
        return max(self._side.waiting_seconds(_key(image)), image.read_wait_seconds)

    def _look_at(self, image: Image) -> None:
        _look_at_path(image)
        try:
            if changed := image.look_at_source():
                _log_changed(image, changed)
            written_ns = image.source.written_ns()
        except OSError as error:
            self._note_lost(image, error)
            return
        self._lost.discard(image.image_no)
        known_ns = self._written_ns.get(image.image_no, image.source.identity.mtime_ns)
        if (
            written_ns != known_ns
            and image.source_change is None
            and time.monotonic() >= self._not_before.get(image.image_no, 0.0)
        ):
            self._side.run(f"bytes {image.image_no}", lambda: self._compare(image, written_ns))

    def _note_lost(self, image: Image, error: OSError) -> None:
        if image.image_no not in self._lost:
            self._lost.add(image.image_no)
            _log.error(
                "source-lost",
                f"its file system is gone or fails ({error.strerror}): guests get errors for "
                "pages that are not in memory",
                image=image.label,
                source=image.source.path,
            )

    def _compare(self, image: Image, written_ns: int) -> None:
        """Compare the bytes of a source whose mtime changed."""
        began = time.monotonic()
        try:
            stop = self._stopping.is_set
            changed = image.content_change(lambda of: digest_of(of, stop), stop)
        except OSError as error:
            changed = f"it was written to, and cannot be read: {error}"
        if self._stopping.is_set() or image.source_change is not None:
            return
        took = time.monotonic() - began
        self._not_before[image.image_no] = began + took * _COMPARE_SHARE
        self._written_ns[image.image_no] = written_ns
        if changed is None:
            _log.notice(
                "source-touched",
                "its times changed and its bytes did not: nothing is wrong",
                image=image.label,
                source=image.source.path,
            )
        else:
            image.source_change = changed
            _log_changed(image, changed)


def _log_changed(image: Image, changed: str) -> None:
    _log.error(
        "source-changed",
        f"{changed}; an image must not change while it is served: "
        "restart with a copy that nothing writes to",
        image=image.label,
        source=image.source.path,
    )


def _key(image: Image) -> str:
    return f"source {image.image_no}"


def _look_at_path(image: Image) -> None:
    before, image.source_at_path = image.source_at_path, image.source.at_path()
    if image.source_at_path == "other" != before:
        _log.notice(
            "source-replaced",
            "the path names another file now: guests keep using the old one; "
            "stop and start the daemon to serve the new one",
            image=image.label,
            source=image.source.path,
        )
    elif image.source_at_path == "gone" != before:
        _log.warning(
            "source-gone",
            "the path names no file now: guests keep using the deleted one, which is lost when "
            "the daemon is stopped; put it back",
            image=image.label,
            source=image.source.path,
        )
