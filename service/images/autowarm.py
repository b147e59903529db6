# SPDX-License-Identifier: Apache-2.0
"""Loads at start what guests of earlier runs touched, in that order, behind what is asked for now.

Demand comes first by itself: loaders take prefetches only when nobody waits. It ends at the
capacity's high watermark, so that it never evicts what it loaded itself, and with the daemon.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator

from cowshed.cache import CowshedError, Image, PageStore
from cowshed.service.images.evictor import Evictor
from cowshed.service.images.working_sets import WorkingSets
from cowshed.service.runtime.logs import EventLog

__all__ = ["Autowarm"]

_log = EventLog("cowshed.autowarm")

_LOOK_SECONDS = 0.1


class Autowarm:
    """One thread, from start() to stop() or until all is loaded that there is room for."""

    def __init__(
        self,
        store: PageStore,
        evictor: Evictor,
        working_sets: WorkingSets,
        load: Callable[[Image, Iterable[int]], Iterator[int]],
    ) -> None:
        self._store = store
        self._evictor = evictor
        self._working_sets = working_sets
        self._load = load
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="autowarm", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End it and wait for that: the step of a load."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        for image in self._store:
            # Which working set is an image's only its digest tells.
            while not image.digest:
                if self._stopping.wait(_LOOK_SECONDS):
                    return
            try:
                self._warm(image)
            except CowshedError as error:
                _log.warning("autowarm-failed", str(error), image=image.label)

    def _warm(self, image: Image) -> None:
        extents = self._working_sets.recorded(image)
        marks = self._evictor.watermarks
        room = marks.capacity_extents - marks.high_free
        room -= sum(each.resident_bytes // each.extent_bytes for each in self._store)
        wanted, done = extents[: max(0, room)], 0
        if not wanted:
            return
        _log.info("autowarm", image=image.label, extents=len(wanted))
        for seen in self._load(image, wanted):
            done = seen
            if self._stopping.is_set():
                break
        how = "whole" if done == len(wanted) == len(extents) else "in part"
        _log.info("autowarmed", image=image.label, extents=done, recorded=len(extents), how=how)
