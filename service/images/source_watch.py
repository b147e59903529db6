# SPDX-License-Identifier: Apache-2.0
"""Looks at images' sources now and then: whether they changed, are where they were, and answer.

A look may hang with its file system. So none is made in the loop, and one that hangs keeps nobody
from looking at the others (runtime/side_threads.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from cowshed.cache import Image
from cowshed.service.runtime.logs import EventLog
from cowshed.service.runtime.side_threads import SideThreads

__all__ = ["HUNG_SECONDS", "SourceWatch"]

_log = EventLog("cowshed")

# A source that leaves a look or a read without an answer for so long hangs.
HUNG_SECONDS: Final = 3.0


class SourceWatch:
    """The looks at every image's source. look() is for the loop; all else is for any thread."""

    def __init__(self, images: Iterable[Image], side: SideThreads) -> None:
        """images is asked anew at each look: more may come."""
        self._images: Final = images
        self._side: Final = side
        self._hung: set[int] = set()

    def look(self) -> None:
        """Begin to look at every source, and log those that hang, or answer again."""
        for image in self._images:
            waits = self.waiting_seconds(image)
            if waits >= HUNG_SECONDS and image.image_no not in self._hung:
                self._hung.add(image.image_no)
                _log.error(
                    "source-hangs",
                    "its file system does not answer: guests of this image wait, and no others",
                    image=image.label,
                    source=image.source.path,
                )
            elif waits < HUNG_SECONDS and image.image_no in self._hung:
                self._hung.discard(image.image_no)
                _log.notice("source-answers", "its guests go on", image=image.label)
            self._side.run(_key(image), lambda image=image: _look_at(image))  # type: ignore[misc]

    def waiting_seconds(self, image: Image) -> float:
        """For how long a source has left a look or a read unanswered, the longest of them."""
        return max(self._side.waiting_seconds(_key(image)), image.read_wait_seconds)


def _key(image: Image) -> str:
    return f"source {image.image_no}"


def _look_at(image: Image) -> None:
    if changed := image.look_at_source():
        _log.error(
            "source-changed",
            f"{changed}; an image must not change while it is served: "
            "restart with a copy that stays as it is",
            image=image.label,
            source=image.source.path,
        )
    before, image.source_at_path = image.source_at_path, image.source.at_path()
    if image.source_at_path == "other" != before:
        _log.notice(
            "source-replaced",
            "the path names another file now: guests go on with the one they began with; "
            "stop and start the daemon to serve the new one",
            image=image.label,
            source=image.source.path,
        )
    elif image.source_at_path == "gone" != before:
        _log.warning(
            "source-gone",
            "the path names no file now: guests go on with the one they began with, which is "
            "lost when the daemon is stopped; put it back",
            image=image.label,
            source=image.source.path,
        )
