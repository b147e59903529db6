# SPDX-License-Identifier: Apache-2.0
"""At start, load the extents that guests of earlier runs touched, in that order.

Demand loads come first: loaders take prefetches only when no fault waits. Warming ends at the
capacity's high watermark, so that it never evicts what it loaded, when an operator aborts it, and
with the daemon.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator

from cowshed.cache import CowshedError, Image, PageStore
from cowshed.service.images.evictor import Evictor
from cowshed.service.images.warming import Warm, Warming
from cowshed.service.images.working_sets import WorkingSets
from cowshed.service.runtime.logs import EventLog

__all__ = ["Autowarm"]

_log = EventLog("cowshed.autowarm")

_LOOK_SECONDS = 0.1


class Autowarm:
    """One thread, from start() to stop() or until everything that fits is loaded.

    Each image has a Warm from start() on, so that it can be aborted before its turn.
    """

    def __init__(
        self,
        store: PageStore,
        evictor: Evictor,
        working_sets: WorkingSets,
        load: Callable[[Image, Iterable[int]], Iterator[int]],
        warming: Warming,
    ) -> None:
        self._store = store
        self._evictor = evictor
        self._working_sets = working_sets
        self._load = load
        self._warming = warming
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="autowarm", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop and join the thread, which takes one step of a load."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        with contextlib.ExitStack() as planned:
            turns = []
            for image in self._store:
                turn = planned.enter_context(contextlib.ExitStack())
                turns.append((turn, turn.enter_context(self._warming.enter(image, "autowarm"))))
            while turns and not self._stopping.is_set():
                # A working set is found by the image's digest. An image whose digest is delayed,
                # because its source hangs, does not delay the others.
                ready = (each for each in turns if each[1].image.digest or each[1].is_aborted)
                found = next(ready, None)
                if found is None:
                    self._stopping.wait(_LOOK_SECONDS)
                    continue
                turns.remove(found)
                with found[0]:
                    self._take_turn(found[1])

    def _take_turn(self, warm: Warm) -> None:
        try:
            self._warm(warm)
        except CowshedError as error:
            _log.warning("autowarm-failed", str(error), image=warm.image.label)

    def _warm(self, warm: Warm) -> None:
        image = warm.image
        extents = [] if warm.is_aborted else self._working_sets.earlier(image)
        marks = self._evictor.watermarks
        room = marks.capacity_extents - marks.high_free
        room -= sum(each.resident_bytes for each in self._store) // self._store.extent_bytes
        wanted = extents[: max(0, room // image.room_of(0))]
        if wanted:
            _log.info("autowarm", image=image.label, extents=len(wanted))
            warm.total_extents = len(wanted)
            for seen in self._load(image, wanted):
                warm.done_extents = seen
                if self._stopping.is_set() or warm.is_aborted:
                    break
        done = warm.done_extents
        is_cut = warm.is_aborted and (done < len(wanted) or not wanted)
        if is_cut:
            how = "aborted"
        else:
            how = "whole" if done == len(wanted) == len(extents) else "in part"
        if wanted or is_cut:
            _log.info("autowarmed", image=image.label, extents=done, recorded=len(extents), how=how)
