# SPDX-License-Identifier: Apache-2.0
"""The page store: all images' frames under one capacity, and the loaders that fill them.

The store never chooses what to evict. It raises `pressure_fd` when room is short and waits.
"""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType
from typing import TYPE_CHECKING, Final, NamedTuple

from cowshed.cache._core import ffi, lib
from cowshed.cache.calls import CLOSED, check_core, checked
from cowshed.cache.counters import Counters
from cowshed.cache.errors import CapacityError, UsageError
from cowshed.cache.fetches import FetchQueue
from cowshed.cache.images import DEFAULT_DOMAIN, PAGE_BYTES, Image, InheritedImage, image_label
from cowshed.cache.remote_source import RemoteSource
from cowshed.cache.sources import FileSource

if TYPE_CHECKING:
    from cowshed.cache._core import StructImageSource

__all__ = [
    "HUGE_EXTENT_BYTES",
    "PageStore",
    "SampleEnd",
    "StoreCounters",
    "StoreEvent",
    "probe_huge_frames",
]

HUGE_EXTENT_BYTES: Final[int] = lib.HUGE_EXTENT_PAGES * PAGE_BYTES
"""Images with extents of so many bytes have frames of huge pages."""

_TAKE_MAX = 4096
_TAKE_ENDS_MAX = 1024


def probe_huge_frames() -> OSError | None:
    """Return why images with extents of HUGE_EXTENT_BYTES cannot be opened here, or None."""
    err = lib.frames_probe_huge()
    return None if err == 0 else OSError(-err, os.strerror(-err))


@dataclass(frozen=True)
class StoreCounters(Counters):
    """The store at one instant, in the store's extents unless the name says otherwise: store.h."""

    capacity_extents: int
    reserved_extents: int
    standby_extents: int
    standby_limit: int
    standby_pages: int
    standby_moving: int
    room_extents: int
    loading_extents: int
    pinned_extents: int
    read_ns: int
    read_extents: int
    fill_cpu_ns: int
    restore_cpu_ns: int
    nr_waiting_loaders: int
    queued_loads: int

    @property
    def free_extents(self) -> int:
        """Room that nobody has taken; without a standby list, what loaders can have."""
        return self.capacity_extents - self.reserved_extents - self.standby_extents


class StoreEvent(IntEnum):
    """What happened to an extent, for the eviction policy."""

    LOADED = lib.EVENT_LOADED
    SOFT_HIT = lib.EVENT_SOFT_HIT
    DROPPED = lib.EVENT_DROPPED


_EVENTS: Final = tuple(StoreEvent)


class SampleEnd(NamedTuple):
    """A sample that a guest touched, or that was dropped; times are of time.monotonic()."""

    image_no: int
    extent: int
    unmapped_at: float
    ended_at: float
    touched: bool


class PageStore:
    """Owns loader threads and images; close it after its guests, or use it in a `with`.

    Room is counted in extents of extent_bytes, the smallest that an image may have; images can have
    larger ones, each a power of two, and have default_extent_bytes (None: the smallest) if they are
    opened without a size. capacity_bytes is rounded down to whole extents. pressure_fd becomes
    readable when fewer than low_free_extents are free or in the standby list, which holds nothing
    until set_standby().
    """

    def __init__(
        self,
        capacity_bytes: int,
        *,
        extent_bytes: int = 64 << 10,
        default_extent_bytes: int | None = None,
        nr_loaders: int = 4,
        low_free_extents: int = 1,
        standby_max_extents: int = 0,
    ) -> None:
        if capacity_bytes < extent_bytes:
            raise CapacityError(
                f"a capacity of {capacity_bytes} bytes is below one extent of {extent_bytes}; "
                "give at least that"
            )
        store = ffi.new("struct store **")
        checked(
            lib.store_init(
                capacity_bytes // extent_bytes,
                extent_bytes // PAGE_BYTES,
                nr_loaders,
                low_free_extents,
                standby_max_extents,
                store,
            ),
            "starting the page store",
        )
        self._store = store[0]
        self._is_left = False
        self._images: dict[int, Image] = {}
        self._unlisted: set[int] = set()
        self._queues: list[FetchQueue] = []
        self.extent_bytes: Final = extent_bytes
        self.default_extent_bytes: Final = default_extent_bytes or extent_bytes
        self.capacity_bytes: Final = capacity_bytes // extent_bytes * extent_bytes

    def __enter__(self) -> PageStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Image]:
        unlisted = self._unlisted
        return iter([image for no, image in list(self._images.items()) if no not in unlisted])

    def cancel_loads(self) -> None:
        """Fail every wait for a load, now and from now on; for shutdown."""
        if self._store is not CLOSED:
            lib.store_cancel_loads(self._store)

    def stop(self, timeout_seconds: float) -> bool:
        """Cancel loads and end the loaders; False if one hangs in a read and is left behind.

        Then close() leaves open what that thread uses, until the process ends; so it does for a
        fetch that was not ended.
        """
        return bool(lib.store_stop(self._store, int(timeout_seconds * 1000)) == 0)

    def close(self) -> None:
        """Close every image and end the loaders; UsageError if a guest is still attached."""
        if self._store is CLOSED or self._is_left:
            return
        closed = [self._close_image(image) for image in list(self._images.values())]
        if not all([*closed, *(queue.close() for queue in self._queues)]):
            return
        checked(lib.store_deinit(self._store), "closing the page store")
        self._store = CLOSED

    def leave(self) -> None:
        """Make close() do nothing: a hung thread uses an image until the process ends."""
        self._is_left = True

    def open_queue(self) -> FetchQueue:
        """Return a queue for the loads of images that have no file; close() closes it."""
        queue = FetchQueue(self._store)
        self._queues.append(queue)
        return queue

    def open_image(
        self,
        name: str,
        source: FileSource | RemoteSource,
        domain: str = DEFAULT_DOMAIN,
        *,
        extent_bytes: int | None = None,
        listed: bool = True,
        queue: FetchQueue | None = None,
    ) -> Image:
        """Take over a source as an image with frames of its own; its extents are ABSENT.

        A RemoteSource needs the queue in which its loads wait for the threads that fetch.

        extent_bytes: None for the default; HUGE_EXTENT_BYTES needs what probe_huge_frames() looks
        for. Iteration skips an image that is not listed, until list_image(). UsageError, and
        nothing taken over, if the domain has an image of that name.
        """
        label = self._new_label(name, domain)
        image = ffi.new("struct image **")
        checked(
            lib.image_open(
                self._store,
                _image_source(source, queue),
                source.size_bytes,
                (extent_bytes or self.default_extent_bytes) // PAGE_BYTES,
                image,
            ),
            f"opening image {label!r} of {source.size_bytes} bytes",
        )
        return self._add(Image(self, name, source, image[0], domain), listed=listed)

    def list_image(self, image: Image) -> None:
        """Include the image in iteration from now on."""
        self._unlisted.discard(image.image_no)

    def adopt_image(
        self,
        name: str,
        source: FileSource | RemoteSource,
        inherited: InheritedImage,
        domain: str = DEFAULT_DOMAIN,
        *,
        extent_bytes: int | None = None,
        queue: FetchQueue | None = None,
    ) -> Image:
        """Take over a source, and its image's descriptors from a process that is gone.

        Resident extents stay resident, as far as there is room. UsageError, with all descriptors
        still the caller's, if the domain has an image of that name, or if the descriptors belong to
        an image of another size or extent size.
        """
        label = self._new_label(name, domain)
        image = ffi.new("struct image **")
        extent_bytes = extent_bytes or self.default_extent_bytes
        fds = (inherited.frames_fd, inherited.guest_fd, inherited.arrays_fd)
        err = lib.image_adopt(
            self._store,
            _image_source(source, queue),
            source.size_bytes,
            extent_bytes // PAGE_BYTES,
            ffi.new("struct inherited_image *", fds),
            image,
        )
        if err == -errno.EBADMSG:
            raise UsageError(
                f"the inherited image {label!r} does not have {source.size_bytes} bytes in extents "
                f"of {extent_bytes}; serve it as before, or detach its guests first"
            )
        checked(err, f"adopting image {label!r}")
        return self._add(Image(self, name, source, image[0], domain))

    def _new_label(self, name: str, domain: str) -> str:
        label = image_label(domain, name)
        there = list(self._images.values())
        if any((image.domain, image.name) == (domain, name) for image in there):
            raise UsageError(f"image {label!r} is open already; use each name once in a domain")
        return label

    def _add(self, image: Image, *, listed: bool = True) -> Image:
        if not listed:
            self._unlisted.add(image.image_no)
        self._images[image.image_no] = image
        return image

    def close_image(self, image: Image) -> None:
        """Close an image and drop its frames; UsageError if a guest is still attached."""
        if self._images.get(image.image_no) is not image:
            raise UsageError(f"image {image.label!r} is not open in this store")
        self._close_image(image)

    def _close_image(self, image: Image) -> bool:
        """Close an image; False if a loader that stop() left behind still uses it."""
        err = lib.image_close(image.cdata)
        if err == -errno.ETIMEDOUT:
            return False
        checked(err, f"closing image {image.label!r}")
        del self._images[image.image_no]
        self._unlisted.discard(image.image_no)
        return True

    def image(self, image_no: int) -> Image | None:
        """Return the open image of that number, or None."""
        return self._images.get(image_no)

    @property
    def pressure_fd(self) -> int:
        """An eventfd: readable when room is short. Borrowed."""
        return lib.store_pressure_fd(self._store)

    @property
    def notice_fd(self) -> int:
        """An eventfd: readable when a guest stopped at its quota or broke. Borrowed."""
        return lib.store_notice_fd(self._store)

    @property
    def wanted_fd(self) -> int:
        """An eventfd: readable when a guest found a region worth opening. Borrowed."""
        return lib.store_wanted_fd(self._store)

    @property
    def standby_fd(self) -> int:
        """The memory of the standby list, for audits; -1 if there is none. Borrowed."""
        return lib.store_standby_fd(self._store)

    @property
    def resident_bytes(self) -> int:
        """Bytes of frames in RESIDENT extents of all images."""
        return sum(image.resident_bytes for image in self)

    def check(self) -> None:
        """Recompute the invariants of the store and of its images; O(extents), under its lock.

        Raises InvariantError naming one that does not hold.
        """
        check_core(lib.store_check(self._store))

    def counters(self) -> StoreCounters:
        """Read the counters, all at one instant."""
        counters = ffi.new("struct store_counters *")
        lib.store_count(self._store, counters)
        return StoreCounters.of(counters)

    def set_standby(self, limit_extents: int, low_free_extents: int) -> None:
        """Set how much the standby list may hold, and the low mark; drops what is over the limit.

        Raises UsageError for more than standby_max_extents.
        """
        checked(
            lib.store_set_standby(self._store, limit_extents, low_free_extents),
            f"keeping {limit_extents} extents in standby",
        )

    def take_sample_ends(self) -> list[SampleEnd]:
        """Take what ended samples since the last call."""
        ends = ffi.new("struct sample_end[]", _TAKE_ENDS_MAX)
        nr = lib.store_take_sample_ends(self._store, ends, _TAKE_ENDS_MAX)
        return [
            SampleEnd(
                end.image_no,
                end.extent,
                end.unmapped_ns / 1e9,
                end.ended_ns / 1e9,
                bool(end.touched),
            )
            for end in ends[0:nr]
        ]

    def take_events(self) -> list[tuple[StoreEvent, tuple[int, int], float]] | None:
        """Take the events since the last call, in order: what, (image_no, extent), and an age.

        The age of a soft hit is how many other extents had come into the standby list since, as a
        part of its limit; 1 for more.

        None if some were lost because the caller came too late: look at the states instead.
        """
        taken = array("Q", bytes(8 * _TAKE_MAX))
        events: list[tuple[StoreEvent, tuple[int, int], float]] = []
        while True:
            nr = lib.store_take_events(self._store, ffi.from_buffer("uint64_t[]", taken), _TAKE_MAX)
            if nr < 0:
                return None
            events.extend(
                (
                    _EVENTS[entry >> 62],
                    (entry >> 32 & 0xFFFFFF, entry & 0xFFFFFFFF),
                    (entry >> 56 & 0x3F) / lib.STANDBY_AGE_MAX,
                )
                for entry in taken[:nr]
            )
            if nr < _TAKE_MAX:
                return events


def _image_source(source: FileSource | RemoteSource, queue: FetchQueue | None) -> StructImageSource:
    if isinstance(source, RemoteSource) != (queue is not None):
        raise UsageError(f"image source {str(source.path)!r}: give a queue to a remote source only")
    origin = queue.cdata if queue is not None else ffi.NULL
    return ffi.new("struct image_source *", (source.fd, source.direct_fd, origin))
