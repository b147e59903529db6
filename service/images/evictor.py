# SPDX-License-Identifier: Apache-2.0
"""The background evictor: keeps room free, as kswapd does, so that loaders seldom wait.

A thread sleeps on the store's pressure descriptor. When room is short it reports new resident
extents to the policy, has it choose victims, evicts them, and reports what was evicted. Commands
that evict go through here too, so that the policy knows of them.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import suppress
from typing import Final, Protocol

from cowshed.accounting import (
    OPEN_PAGES,
    CloseReason,
    EvictionPolicy,
    EvictReason,
    ExtentKey,
    StandbySize,
    Watermarks,
    evict,
)
from cowshed.cache import CapacityError, ExtentState, Image, PageStore, StoreCounters, StoreEvent
from cowshed.cache._core import lib
from cowshed.service.runtime.logs import EventLog

__all__ = ["Evictor"]

_log = EventLog("cowshed.evictor")

_IDLE_SECONDS: Final = 1.0
_SCRUB_SECONDS: Final = 1.0
# While loaders wait and nothing can be evicted (all held or pinned for the moment): retry soon.
_RETRY_SECONDS: Final = 0.005
# Extents unmapped into the standby list for each that was read: many soft hits may come between two
# loads, but one load must not unmap a large part of the cache. While nothing is read, no room is
# needed, and nothing is unmapped: guests would only touch it again.
_UNMAPS_PER_LOAD: Final = 8
_UNMAPS_MIN: Final = 64
# The standby list is filled up again once it lacks one in this many.
_LOW_SHARE: Final = 16


class OpenRegions(Protocol):
    """What the evictor asks of the opener (guests/opener.py): it has extents pinned."""

    def close_for_room(self, nr_extents: int, *, is_last_resort: bool = False) -> int: ...
    def close_range(
        self, image: Image, first_extent: int, nr_extents: int, reason: CloseReason
    ) -> None: ...
    def close_all(self) -> None: ...


class _StoreHeat:
    """The policy's queries of the store, per extent."""

    def __init__(self, store: PageStore) -> None:
        self._store = store

    def take_touches(self, key: ExtentKey) -> int:
        image = self._store.image(key[0])
        return lib.image_take_touches(image.cdata, key[1]) if image else 0

    def refs(self, key: ExtentKey) -> int:
        image = self._store.image(key[0])
        return lib.image_extent_refs(image.cdata, key[1]) if image else 0

    def evictable(self, key: ExtentKey) -> bool:
        image = self._store.image(key[0])
        return bool(image and lib.image_extent_idle(image.cdata, key[1]))

    def room_of(self, key: ExtentKey) -> int:
        image = self._store.image(key[0])
        return image.room_of(key[1]) if image else 1


class Evictor:
    """Owns the policy and the thread. Must be started after the store, and stopped before it.

    Room is in the store's extents; largest_extent is that of the largest extent of any image.
    """

    def __init__(self, store: PageStore, standby_percent: int = 0, largest_extent: int = 1) -> None:
        counters = store.counters()
        capacity = counters.capacity_extents
        self._store = store
        standby = capacity * standby_percent // 100
        self._heat = _StoreHeat(store)
        room_of = self._heat.room_of if largest_extent > 1 else None
        self._policy = EvictionPolicy(capacity, standby, room_of)
        self._size = StandbySize(standby)
        self._counted = counters
        self._marks = (0, 0)
        self._lock = threading.Lock()
        self._stop_reader, self._stop_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="evictor", daemon=True)
        self.watermarks: Final = Watermarks(capacity, largest_extent)
        self.open_regions: OpenRegions | None = None

    def start(self) -> None:
        """Turn the standby list on and start the thread."""
        if self._policy.has_standby:
            self._set_standby(self._store.counters())
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread; loaders that wait for room keep waiting."""
        os.write(self._stop_writer, b"x")
        self._thread.join()
        os.close(self._stop_reader)
        os.close(self._stop_writer)

    @property
    def max_pinned_extents(self) -> int:
        """How much may be pinned, in the store's extents; leaves room to load and to evict."""
        marks = self.watermarks
        return marks.capacity_extents - marks.high_free - marks.largest_extent

    def evict_now(self, image: Image, extents: Iterable[int]) -> list[int]:
        """Evict those of an image's extents that are evictable; return the evicted."""
        wanted = list(extents)
        if self.open_regions is not None and wanted:
            nr = max(wanted) - min(wanted) + 1
            self.open_regions.close_range(image, min(wanted), nr, CloseReason.REQUEST)
        with self._lock:
            self._admit()
            return self._evict_from(image, wanted, EvictReason.REQUEST)

    def pin(self, image: Image, extents: range) -> None:
        """Pin extents; regions that are open elsewhere give way. CapacityError: too many."""
        most = max(0, self.max_pinned_extents)
        room = len(extents) * image.extent_bytes // self._store.extent_bytes
        while True:
            try:
                image.pin(extents.start, len(extents), most)
            except CapacityError:
                regions = self.open_regions
                if regions is None or not regions.close_for_room(room, is_last_resort=True):
                    raise
            else:
                return

    def sample(self, keys: Iterable[ExtentKey]) -> list[tuple[Image, int]]:
        """Unmap those of the extents that can be into the standby list; return them.

        The policy goes on tracking them: nothing says yet that they are not used. Regions that are
        open are closed for it.
        """
        taken: list[tuple[Image, int]] = []
        for image_no, extent in keys:
            image = self._store.image(image_no)
            if image is None or not self.is_kept(image):
                continue
            if self.open_regions is not None:
                self.open_regions.close_range(image, extent, 1, CloseReason.SAMPLE)
            with self._lock:
                if evict(image, [extent], EvictReason.SAMPLE):
                    taken.append((image, extent))
        return taken

    def is_costly(self, key: ExtentKey) -> bool:
        """Whether a probe of the extent takes milliseconds: it lies in a huge page."""
        image = self._store.image(key[0])
        return image is not None and image.is_collapsed(key[1] * image.extent_pages // OPEN_PAGES)

    def is_kept(self, image: Image) -> bool:
        """Whether the standby list takes an image's extents; larger ones are dropped at once."""
        return image.extent_bytes == self._store.extent_bytes

    def check(self) -> None:
        """Recompute the policy's invariants. Raises InvariantError."""
        with self._lock:
            self._policy.check()

    def close_image(self, image: Image) -> None:
        """Close an image that was never listed, so that no other thread uses it."""
        with self._lock:
            self._store.close_image(image)
            self._policy.drop_image(image.image_no)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._store.pressure_fd, select.POLLIN)
        poll.register(self._stop_reader, select.POLLIN)
        wait = _IDLE_SECONDS
        next_scrub = time.monotonic() + _SCRUB_SECONDS
        while True:
            ready = [fd for fd, _ in poll.poll(wait * 1000)]
            if self._stop_reader in ready:
                return
            if ready:
                os.read(self._store.pressure_fd, 8)
            try:
                with self._lock:
                    waiting = self._make_room()
                if time.monotonic() >= next_scrub:
                    self._scrub()
                    next_scrub = time.monotonic() + _SCRUB_SECONDS
            except Exception:
                _log.crash("evictor-failed", "trying again; a defect of cowshed: please report it")
                waiting = True
            wait = _RETRY_SECONDS if waiting else _IDLE_SECONDS

    def _make_room(self) -> bool:
        """Evict up to the high watermark; return whether room is still short afterwards."""
        self._admit()
        counters = self._store.counters()
        if self._policy.has_standby:
            return self._fill_standby(counters)
        wanted = self.watermarks.nr_to_evict(counters.free_extents)
        if wanted:
            self._evict_keys(self._choose(wanted), EvictReason.PRESSURE)
            counters = self._store.counters()
        return counters.nr_waiting_loaders > 0 or counters.free_extents < self.watermarks.low_free

    def _choose(self, nr_wanted: int) -> list[ExtentKey]:
        """Choose victims, from open regions too; none if all are held or pinned for the moment."""
        regions = self.open_regions
        if regions is not None:
            regions.close_for_room(nr_wanted)
        with suppress(CapacityError):
            return self._policy.choose_victims(nr_wanted, self._heat)
        if regions is not None and regions.close_for_room(nr_wanted, is_last_resort=True):
            with suppress(CapacityError):
                return self._policy.choose_victims(nr_wanted, self._heat)
        return []

    def _fill_standby(self, counters: StoreCounters) -> bool:
        """Unmap victims into the standby list if loads need room; return whether loaders wait."""
        before, self._counted = self._counted, counters
        nr_read = counters.read_extents - before.read_extents
        self._size.note(
            nr_read,
            counters.read_ns - before.read_ns,
            (counters.restore_cpu_ns - before.restore_cpu_ns)
            + (counters.fill_cpu_ns - before.fill_cpu_ns),
        )
        target = self._set_standby(counters)
        room = counters.room_extents
        if nr_read or room < self.watermarks.low_free:
            wanted = min(target - room, max(_UNMAPS_MIN, _UNMAPS_PER_LOAD * nr_read))
            # After a restart with less capacity: these are dropped, not kept.
            wanted = max(wanted, counters.reserved_extents - counters.capacity_extents)
            if wanted > 0:
                self._evict_keys(self._choose(wanted), EvictReason.STANDBY)
        return self._store.counters().nr_waiting_loaders > 0

    def _set_standby(self, counters: StoreCounters) -> int:
        """Set how long the list may be, less for what is pinned; return how long it is to be kept.

        While all images fit into the capacity no room is needed, and the list has samples only.
        """
        unpinned = 1 - counters.pinned_extents / counters.capacity_extents
        images = list(self._store)
        most = sum(image.room_extents for image in images if self.is_kept(image))
        limit = max(1, min(most, int(self._size.extents * unpinned)))
        nr_extents = sum(image.room_extents for image in images)
        beyond = nr_extents - counters.capacity_extents + self.watermarks.high_free
        # What the list does not take must leave free room behind it, as without a list.
        least = 0 if all(map(self.is_kept, images)) else self.watermarks.high_free
        target = max(0, min(max(limit, least), beyond))
        marks = limit, max(0, target - max(1, target // _LOW_SHARE))
        if marks != self._marks:
            self._store.set_standby(*marks)
            self._marks = marks
        return target

    def _evict_keys(self, keys: Iterable[ExtentKey], reason: EvictReason) -> None:
        by_image: defaultdict[int, list[int]] = defaultdict(list)
        for image_no, extent in keys:
            by_image[image_no].append(extent)
        for image_no, extents in by_image.items():
            image = self._store.image(image_no)
            if image is None:
                self._policy.drop_image(image_no)
                continue
            self._evict_from(image, extents, reason)

    def _evict_from(self, image: Image, extents: list[int], reason: EvictReason) -> list[int]:
        gone = evict(image, extents, reason)
        keys = [(image.image_no, extent) for extent in gone]
        # The policy does not track an extent that became resident a moment ago.
        tracked = [key for key in keys if key in self._policy]
        if reason == EvictReason.STANDBY:
            self._policy.unmap(tracked)
        else:
            self._policy.forget(tracked, evicted=True)
        return gone

    def _admit(self) -> None:
        """Report to the policy what happened to extents since the last call."""
        events = self._store.take_events()
        if events is None:
            self._compare()
            return
        reloads: Counter[int] = Counter()
        for event, key, age in events:
            if event == StoreEvent.SOFT_HIT:
                self._policy.touch(key, age)
            elif event == StoreEvent.DROPPED:
                self._policy.drop(key)
            elif key not in self._policy:
                reloads[key[0]] += self._policy.remembers(key)
                self._policy.admit([key])
        for image_no, nr_extents in reloads.items():
            if nr_extents and (image := self._store.image(image_no)):
                image.note_reloads(nr_extents)

    def _compare(self) -> None:
        """Tell the policy what is resident and what is gone, after events were lost; O(extents)."""
        for image in self._store:
            for extent, (state, is_kept) in enumerate(
                zip(image.states(), image.in_standby(), strict=True)
            ):
                key = image.image_no, extent
                if state == ExtentState.RESIDENT and key not in self._policy:
                    self._policy.admit([key])
                elif state == ExtentState.ABSENT and not is_kept:
                    self._policy.drop(key)

    def _scrub(self) -> None:
        """Empty strays: frames that no load wrote, but a read of an unguarded mapping filled."""
        for image in self._store:
            # Loads and evictions under way make a difference too; a scrub is cheap then.
            if os.fstat(image.frames_fd).st_blocks * 512 > image.resident_bytes:
                nr = image.scrub()
                if nr:
                    _log.warning(
                        "strays-emptied",
                        "a guest read a mapping without userfaultfd, which fills it with zeros",
                        image=image.label,
                        extents=nr,
                    )
