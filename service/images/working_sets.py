# SPDX-License-Identifier: Apache-2.0
"""Which extents each image's guests touched first, kept in the state directory between runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from cowshed.accounting import FirstTouches, read_working_set, write_working_set
from cowshed.cache import CowshedError, Image
from cowshed.service.runtime.logs import EventLog

__all__ = ["WorkingSets"]

_log = EventLog("cowshed.workingsets")


class WorkingSets:
    """Reads what an earlier run recorded, and writes what this one saw, one file per image."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._written: dict[str, int] = {}
        self._complained: dict[str, str] = {}

    def path(self, image: Image) -> Path:
        """Where an image's working set is kept: each domain but the default one has its folder."""
        return self._state_dir / f"{image.label}.workingset"

    def recorded(self, image: Image) -> list[int]:
        """Give the extents to load first: this run's touches, then an earlier run's; maybe none."""
        return _in_order(image.first_touches(), self.earlier(image))

    def earlier(self, image: Image) -> Sequence[int]:
        """Give the extents that guests of earlier runs touched, in that order; maybe none.

        Empty while the image's digest is not known, and if the file is unusable, which is logged.
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
            # It stays so until a save replaces it: one line is enough.
            if self._complained.get(image.label) != str(error):
                self._complained[image.label] = str(error)
                _log.warning("working-set-unusable", str(error), image=image.label)
            return ()
        return recorded.extents if recorded else ()

    def save(self, images: Iterable[Image]) -> None:
        """Write the working sets that grew since they were written; a failure is logged.

        A run that touched less than an earlier one keeps what that knew, behind its own; the set
        is never longer than the longer of the two, so that it follows what guests do now.
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
