# SPDX-License-Identifier: Apache-2.0
"""Opens regions for mapped guests, and closes them (accounting/core/open_regions.h).

A thread sleeps on the store's eventfd, which fault threads raise when a region would be worth
opening. It makes the region's frames one huge page, then opens it for the guests that named it.
Regions that operators have pinned are opened for every guest of the image. Other threads have
regions closed: the evictor, and commands.
"""

from __future__ import annotations

import errno
import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from cowshed.accounting import OPEN_PAGES, CloseReason, OpeningPolicy, RegionKey
from cowshed.cache import Image, PageStore, PeerError
from cowshed.cache.images import PAGE_BYTES
from cowshed.faults import PopulateHandler
from cowshed.service.guests.guests import GuestTable, Mapping
from cowshed.service.images.evictor import Evictor
from cowshed.service.runtime.logs import EventLog

__all__ = ["Opener"]

_log = EventLog("cowshed.opener")

_TICK_SECONDS: Final = 1.0
# Looks for pinned regions are as far apart: a look takes a nanosecond for each extent of an image.
_LOOK_SECONDS: Final = 0.05
# Regions taken from one account at a time: then the next one's turn comes.
_TAKEN: Final = 256
# Making a huge page takes a CPU for a millisecond or more: at most this part of the time.
_COLLAPSE_SHARE: Final = 0.25
# A store for less than four regions opens only pinned ones: others would take the room of loads.
_LEAST_BYTES: Final = 4 * OPEN_PAGES * PAGE_BYTES
# Of the extents that may be pinned, those that open regions may take: operators pin the rest.
_PINNED_SHARE: Final = 0.75
# Errors of a collapse that are the kernel's; the busy ones mean that a frame is in use just now.
_BUSY: Final = frozenset({errno.EAGAIN, errno.EBUSY})
_REFUSED: Final = _BUSY | {errno.ENOMEM, errno.EINVAL, errno.EPERM}


class Opener:
    """One thread, from start() to stop(); the methods that close are for any thread.

    which is the setting open_regions: "auto", "pinned" or "off"; auto is pinned in a store of less
    than 8 MiB, where a region takes much of the room of loads. No region is opened while
    is_moving(): guests are about to leave for another backend. Takes the guest table's lock for
    each region that it opens or closes, microseconds.
    """

    def __init__(
        self,
        store: PageStore,
        guests: GuestTable,
        evictor: Evictor,
        which: str = "auto",
        is_moving: Callable[[], bool] = lambda: False,
    ) -> None:
        self._store = store
        self._guests = guests
        self._evictor = evictor
        is_small = store.counters().capacity_extents * store.extent_bytes < _LEAST_BYTES
        self._which = "pinned" if is_small and which == "auto" else which
        self._is_moving = is_moving
        self._policy = OpeningPolicy()
        self._lock = threading.Lock()  # of the policy
        self._pinned: set[RegionKey] = set()
        self._looked = 0.0
        self._stop_reader, self._stop_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="opener", daemon=True)
        self._stopping = threading.Event()
        self._failed_logged = False
        self._full_logged = False
        evictor.open_regions = self

    def start(self) -> None:
        """Take up the regions that restored guests have open, and start the thread."""
        now = time.monotonic()
        for mapping in self._mappings():
            for region_no in mapping.account.open_regions():
                self._policy.note_opened((mapping.image.image_no, region_no), now)
        self._thread.start()

    def stop(self) -> None:
        """Stop and join the thread; regions stay open."""
        self._stopping.set()
        os.write(self._stop_writer, b"x")
        self._thread.join()
        os.close(self._stop_reader)
        os.close(self._stop_writer)

    def close_for_room(self, nr_extents: int, *, is_last_resort: bool = False) -> int:
        """Close regions so that some of nr_extents may be evicted from them; return how many.

        is_last_resort: nothing else can be evicted. What operators have pinned stays open.
        """
        nr_open = self._open_extents()
        if is_last_resort:
            return self._close_oldest(nr_extents, nr_open)
        resident = self._store.resident_bytes // self._store.extent_bytes
        with self._lock:
            keys = self._policy.choose_for_room(nr_extents, nr_open, resident, self._pinned)
        return sum(self._close(key, CloseReason.PRESSURE) for key in keys)

    def _close_oldest(self, nr_extents: int, nr_open: int) -> int:
        """Close regions until some were, or each was tried: guests may have closed them since."""
        kept = self._look()
        tried: set[RegionKey] = set()
        nr_closed = 0
        while not nr_closed:
            with self._lock:
                keys = self._policy.choose_all_for(nr_extents, nr_open, kept | tried)
            if not keys:
                break
            nr_closed = sum(self._close(key, CloseReason.PRESSURE) for key in keys)
            tried.update(keys)
        return nr_closed

    def close_all(self) -> None:
        """Close all regions: guests are about to leave for another backend."""
        for mapping in self._mappings():
            with self._guests.lock:
                if mapping not in mapping.guest.mappings:
                    continue
                try:
                    mapping.account.close_regions(CloseReason.FREEZE)
                except PeerError as error:
                    _log.warning("region-stays-open", str(error), guest=mapping.name)

    def close_range(
        self, image: Image, first_extent: int, nr_extents: int, reason: CloseReason
    ) -> None:
        """Close an image's open regions that touch the extents; no pinned ones for a sample."""
        per_extent = image.extent_pages
        first = first_extent * per_extent // OPEN_PAGES
        last = ((first_extent + nr_extents) * per_extent - 1) // OPEN_PAGES
        with self._lock:
            keys = [(image.image_no, no) for no in range(first, last + 1)]
            kept = self._pinned if reason is CloseReason.SAMPLE else frozenset()
            keys = [key for key in keys if key in self._policy and key not in kept]
        for key in keys:
            self._close(key, reason)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._store.wanted_fd, select.POLLIN)
        poll.register(self._stop_reader, select.POLLIN)
        due = look_at = time.monotonic()
        while not self._stopping.is_set():
            wait = max(0.0, min(due, look_at) - time.monotonic())
            ready = [fd for fd, _ in poll.poll(wait * 1000)]
            if self._store.wanted_fd in ready:
                os.read(self._store.wanted_fd, 8)
            try:
                look_at = due
                opens = self._which != "off" and not self._is_moving()
                if opens and (self._pinned or self._has_pins()):
                    if time.monotonic() >= self._looked + _LOOK_SECONDS:
                        self._open_pinned()
                    look_at = self._looked + _LOOK_SECONDS if ready else due
                if opens and self._which == "auto":
                    self._open_wanted()
                if time.monotonic() >= due:
                    self._sample()
                    due = time.monotonic() + _TICK_SECONDS
            except Exception:
                _log.crash("opener-failed", "trying again; a defect of cowshed: please report it")
                self._stopping.wait(_TICK_SECONDS)

    @property
    def _most(self) -> int:
        return max(0, int(self._evictor.max_pinned_extents * _PINNED_SHARE))

    def _open_extents(self) -> int:
        nr_regions = sum(image.counters().lent_regions for image in self._store)
        return nr_regions * OPEN_PAGES * PAGE_BYTES // self._store.extent_bytes

    def _has_pins(self) -> bool:
        return self._store.counters().pinned_extents > self._open_extents()

    def _mappings(self, image: Image | None = None) -> list[Mapping]:
        """Return the mappings whose regions may be opened, of all images or of one."""
        with self._guests.lock:
            return [
                mapping
                for guest in self._guests
                if image is None or guest.image is image
                for mapping in guest.mappings
                if not isinstance(mapping.handler, PopulateHandler)
            ]

    def _look(self) -> set[RegionKey]:
        """Return the regions that operators have pinned, of images that guests have open."""
        return {
            (image.image_no, no)
            for image in self._store
            if any(guest.image is image for guest in self._guests)
            for no in image.pinned_regions()
        }

    def _open_pinned(self) -> None:
        """Open what operators have pinned, for every guest that has it closed."""
        self._looked = time.monotonic()
        self._pinned = self._look()
        most = self._evictor.max_pinned_extents
        for mapping in self._mappings() if self._pinned else ():
            with self._guests.lock:
                if mapping not in mapping.guest.mappings:
                    continue
                is_open = set(mapping.account.open_regions())
            image = mapping.image
            for image_no, region_no in sorted(self._pinned):
                if self._stopping.is_set():
                    return
                if image_no != image.image_no or region_no in is_open:
                    continue
                if self._is_refused((image_no, region_no)):
                    continue
                if self._collapse(image, region_no, most):
                    self._open(mapping, region_no, most)

    def _is_refused(self, key: RegionKey) -> bool:
        with self._lock:
            return self._policy.is_refused(key, time.monotonic())

    def _open_wanted(self) -> None:
        for mapping, region_no in self._take_wanted():
            if self._stopping.is_set():
                return
            image = mapping.image
            key = image.image_no, region_no
            with self._lock:
                named = self._policy.name(
                    key,
                    mapping.account_no,
                    time.monotonic(),
                    is_collapsed=image.is_collapsed(region_no),
                )
            if named and self._collapse(image, region_no, self._most):
                for each in self._mappings(image):
                    if each.account_no in named:
                        self._open(each, region_no, self._most)

    def _take_wanted(self) -> Iterator[tuple[Mapping, int]]:
        for mapping in self._mappings():
            with self._guests.lock:
                if mapping not in mapping.guest.mappings:
                    continue
                taken = mapping.account.take_wanted(_TAKEN)
            if len(taken) == _TAKEN:
                os.eventfd_write(self._store.wanted_fd, 1)
            for region_no in taken:
                yield mapping, region_no

    def _collapse(self, image: Image, region_no: int, most: int) -> bool:
        """Make a region's frames one huge page; return whether they are."""
        if image.is_collapsed(region_no):
            return True
        began = time.monotonic()
        err = -image.collapse(region_no, most)
        seconds = time.monotonic() - began
        if err in _REFUSED:
            with self._lock:
                key = image.image_no, region_no
                self._policy.note_refused(key, began, is_busy=err in _BUSY)
            if err not in _BUSY and not self._failed_logged:
                self._failed_logged = True
                _log.warning(
                    "collapse-refused",
                    "the kernel makes no huge page of these frames: guests fault there as before; "
                    "see collapse_failures in status, free memory, and shmem_enabled in /sys",
                    image=image.label,
                    region=region_no,
                    errno=errno.errorcode.get(err, str(err)),
                )
        self._stopping.wait(seconds * (1 / _COLLAPSE_SHARE - 1))
        return err == 0

    def _open(self, mapping: Mapping, region_no: int, most: int) -> None:
        with self._guests.lock:
            if mapping not in mapping.guest.mappings or self._is_moving():
                return
            err = -mapping.account.open_region(region_no, OPEN_PAGES, most)
        if err == 0:
            with self._lock:
                self._policy.note_opened((mapping.image.image_no, region_no), time.monotonic())
        elif err == errno.ENOMEM:
            with self._lock:
                key = mapping.image.image_no, region_no
                self._policy.note_refused(key, time.monotonic())
            if not self._full_logged:
                self._full_logged = True
                _log.warning(
                    "region-not-opened",
                    "the guest may have no more mappings, and faults there as before; raise "
                    "vm.max_map_count, or serve with --open-regions off",
                    guest=mapping.name,
                    image=mapping.image.label,
                    region=region_no,
                )
        elif err == errno.ENOENT:
            _log.warning(
                "region-lost",
                "the guest changed its mapping in the instant when no event tells of it: these "
                "frames stay in memory until it ends",
                guest=mapping.name,
                image=mapping.image.label,
                region=region_no,
            )

    def _sample(self) -> None:
        """Close one region that has been open for long, to learn whether it is used."""
        with self._lock:
            key = self._policy.choose_sample(time.monotonic())
        if key is None:
            return
        if key in self._pinned:
            with self._lock:
                self._policy.note_opened(key, time.monotonic())
        else:
            self._close(key, CloseReason.SAMPLE)

    def _close(self, key: RegionKey, reason: CloseReason) -> int:
        """Close a region for all guests; return for how many it was open."""
        image_no, region_no = key
        image = self._store.image(image_no)
        nr = 0
        is_closed = True
        with self._lock:  # not afterwards: a guest may have it opened again while others are closed
            self._policy.note_closed(key)
        for mapping in self._mappings(image) if image is not None else ():
            with self._guests.lock:
                if mapping not in mapping.guest.mappings:
                    continue
                try:
                    nr += mapping.account.close_regions(reason, region_no, 1)
                except PeerError as error:
                    is_closed = False
                    _log.warning("region-stays-open", str(error), guest=mapping.name)
        if not is_closed:
            with self._lock:
                self._policy.note_opened(key, time.monotonic())
        return nr
