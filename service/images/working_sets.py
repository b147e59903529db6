# SPDX-License-Identifier: Apache-2.0
"""The extents that each image's guests touched first, kept in the state directory between runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from cowshed.accounting import FirstTouches, read_working_set, write_working_set
from cowshed.cache import CowshedError, Image
from cowshed.service.runtime.logs import EventLog

__all__ = ["WorkingSets"]

_log = EventLog("cowshed.workingsets")


class WorkingSets:
    """Reads the working sets of earlier runs, and writes this run's, one file per image."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._written: dict[str, int] = {}
        self._complained: dict[str, str] = {}

    def path(self, image: Image) -> Path:
        """Return the path of an image's working set; each non-default domain has a folder."""
        return self._state_dir / f"{image.label}.workingset"

    def recorded(self, image: Image) -> list[int]:
        """Return the extents to load first: this run's touches, then an earlier run's."""
        return _in_order(image.first_touches(), self.earlier(image))

    def earlier(self, image: Image) -> Sequence[int]:
        """Return the extents that guests of earlier runs touched, in that order.

        Empty while the image's digest is unknown, and if the file is unusable, which is logged.
        """
        if not image.digest:
            return ()
        try:
            recorded = read_working_set(
                self.path(image),
                digest=image.digest,
                extent_bytes=image.extent_bytes,
                nr_image_extents=image.nr_extents,
            )
        except CowshedError as error:
            # Logged once: the file stays unusable until a save replaces it.
            if self._complained.get(image.label) != str(error):
                self._complained[image.label] = str(error)
                _log.warning("working-set-unusable", str(error), image=image.label)
            return ()
        return recorded.extents if recorded else ()

    def save(self, images: Iterable[Image]) -> None:
        """Write the working sets that grew since they were written; a failure is logged.

        If this run touched fewer extents than an earlier one, the earlier run's follow its own. The
        set never grows beyond the longer of the two, so that it follows what guests do now.
        """
        for image in images:
            order = image.first_touches()
            if not image.digest or len(order) <= self._written.get(image.label, 0):
                continue
            earlier = self.earlier(image)
            touches = FirstTouches()
            touches.note(_in_order(order, earlier)[: max(len(order), len(earlier))])
            try:
                self.path(image).parent.mkdir(parents=True, exist_ok=True)
                write_working_set(
                    self.path(image),
                    touches.working_set(
                        digest=image.digest,
                        extent_bytes=image.extent_bytes,
                        nr_image_extents=image.nr_extents,
                    ),
                )
            except (CowshedError, OSError) as error:
                _log.warning("working-set-unsaved", str(error), image=image.label)
                continue
            self._written[image.label] = len(order)


def _in_order(first: Iterable[int], then: Iterable[int]) -> list[int]:
    return list(dict.fromkeys([*first, *then]))
