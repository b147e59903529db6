# SPDX-License-Identifier: Apache-2.0
"""An image as Python sees it: its shape, its statistics, and orders about its extents.

Nothing here touches a frame. Extents are numbered from 0; arrays hold one entry per extent.
"""

from __future__ import annotations

import itertools
import os
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from cowshed.cache._core import ffi, lib
from cowshed.cache.calls import checked
from cowshed.cache.counters import Counters
from cowshed.cache.remote_source import RemoteSource
from cowshed.cache.sources import FileSource, SourceAtPath

if TYPE_CHECKING:
    from cowshed.cache._core import Array, StructImage
    from cowshed.cache.store import PageStore

__all__ = [
    "DEFAULT_DOMAIN",
    "ExtentState",
    "Image",
    "ImageCounters",
    "ImageStatistics",
    "InheritedImage",
    "image_label",
]

PAGE_BYTES: Final = 4096
DEFAULT_DOMAIN: Final = "default"


def image_label(domain: str, name: str) -> str:
    """Name an image as logs and messages do: DOMAIN/NAME, or NAME in the default domain."""
    return name if domain == DEFAULT_DOMAIN else f"{domain}/{name}"


class ExtentState(IntEnum):
    """The life of an extent: ABSENT -> LOADING -> RESIDENT -> EVICTING -> ABSENT."""

    ABSENT = lib.EXTENT_ABSENT
    LOADING = lib.EXTENT_LOADING
    RESIDENT = lib.EXTENT_RESIDENT
    EVICTING = lib.EXTENT_EVICTING


@dataclass(frozen=True)
class ImageCounters(Counters):
    """An image's totals, over restarts too; each only grows. Meanings: image.h."""

    loads: int
    load_bytes: int
    load_errors: int
    load_retries: int
    demand_loads: int
    prefetch_loads: int
    evictions: int
    evictions_pressure: int
    evictions_request: int
    soft_hits: int
    standby_unmaps: int
    standby_samples: int
    sample_hits: int
    strays: int
    nr_touched: int
    reloads: int
    attaches: int
    collapse_failures: int
    lent_regions: int


@dataclass(frozen=True)
class ImageStatistics:
    """Sums over an image's extents, in bytes; not a consistent snapshot. Meanings: image.h.

    resident_by_refs counts RESIDENT extents with 0, 1, 2-3, 4-7, 8-15, 16-31 and more references.
    """

    resident_bytes: int
    granted_bytes: int
    saved_bytes: int
    pinned_bytes: int
    touched_bytes: int
    touched_resident_bytes: int
    resident_by_refs: tuple[int, ...]


@dataclass(frozen=True)
class InheritedImage:
    """Descriptors of an image whose process is gone: frames, frames for guests, arrays."""

    frames_fd: int
    guest_fd: int
    arrays_fd: int


class Image:
    """An open image. Made by PageStore.open_image; used until PageStore.close_image.

    Two images of one source, in different domains say, share no frames. domain and name together
    are unique in a store. digest is "sha256:...", or "" until it is computed. source_change states
    how the source changed since it was opened, or is None; source_at_path states what its path
    named at the last look.
    """

    def __init__(
        self,
        store: PageStore,
        name: str,
        source: FileSource | RemoteSource,
        cdata: StructImage,
        domain: str,
    ) -> None:
        shape = ffi.new("struct image_shape *")
        lib.image_shape(cdata, shape)
        self.store: Final = store
        self.name: Final = name
        self.domain: Final = domain
        self.source: Final = source
        self.cdata: Final = cdata
        self.digest = ""
        self.source_change: str | None = None
        self.source_at_path: SourceAtPath = "same"
        self.image_no: Final[int] = shape.image_no
        self.size_bytes: Final[int] = shape.size_bytes
        self.map_bytes: Final[int] = shape.map_bytes
        self.nr_pages: Final[int] = shape.nr_pages
        self.nr_extents: Final[int] = shape.nr_extents
        self.extent_pages: Final[int] = shape.extent_pages

    @property
    def label(self) -> str:
        """The image's name in logs and messages: see image_label()."""
        return image_label(self.domain, self.name)

    @property
    def extent_bytes(self) -> int:
        """Bytes in each extent but the last, which may have fewer."""
        return self.extent_pages * PAGE_BYTES

    @property
    def room_extents(self) -> int:
        """The room of all its extents in the store, in the store's extents."""
        return -(-self.map_bytes // self.store.extent_bytes)

    def room_of(self, extent: int) -> int:
        """Return the room of one extent in the store, in the store's extents."""
        return -(-self.extent_bytes_of(extent) // self.store.extent_bytes)

    @property
    def guest_fd(self) -> int:
        """The frames, read-only: guests get this descriptor. Borrowed."""
        return lib.image_guest_fd(self.cdata)

    @property
    def frames_fd(self) -> int:
        """The frames, read-write: for audits. Borrowed."""
        return lib.image_frames_fd(self.cdata)

    @property
    def arrays_fd(self) -> int:
        """The totals and per-extent arrays, for the successor. Borrowed."""
        return lib.image_arrays_fd(self.cdata)

    @property
    def resident_bytes(self) -> int:
        """Bytes of frames in RESIDENT extents."""
        return lib.image_resident_pages(self.cdata) * PAGE_BYTES

    @property
    def read_wait_seconds(self) -> float:
        """Age of the longest read of the source that is under way; 0.0 if none is."""
        return float(lib.image_read_wait_ns(self.cdata)) / 1e9

    @property
    def generation(self) -> int:
        """Changes whenever an extent's state does: between two equal readings, no state changed."""
        return lib.image_generation(self.cdata)

    def counters(self) -> ImageCounters:
        """Read the counters; not a consistent snapshot."""
        counters = ffi.new("struct image_counters *")
        lib.image_count(self.cdata, counters)
        return ImageCounters.of(counters)

    def statistics(self) -> ImageStatistics:
        """Add up all extents; about 1 ns each."""
        statistics = ffi.new("struct image_statistics *")
        lib.image_measure(self.cdata, statistics)
        return ImageStatistics(
            resident_bytes=statistics.resident_pages * PAGE_BYTES,
            granted_bytes=statistics.granted_pages * PAGE_BYTES,
            saved_bytes=statistics.saved_pages * PAGE_BYTES,
            pinned_bytes=statistics.pinned_pages * PAGE_BYTES,
            touched_bytes=statistics.touched_pages * PAGE_BYTES,
            touched_resident_bytes=statistics.touched_resident_pages * PAGE_BYTES,
            resident_by_refs=tuple(statistics.resident_by_refs),
        )

    def states(self, first_extent: int = 0, nr_extents: int | None = None) -> bytes:
        """One ExtentState value per extent, of all or of nr_extents from first_extent."""
        nr_extents = self.nr_extents - first_extent if nr_extents is None else nr_extents
        states = bytearray(nr_extents)
        checked(
            lib.image_states(self.cdata, first_extent, nr_extents, ffi.from_buffer(states)),
            f"reading the states of {self.label!r}",
        )
        return bytes(states)

    def walk_resident(self, at: int, stride: int, nr_steps: int) -> tuple[int | None, int]:
        """Look at extents from `at` on by stride, around the end, for a resident one; O(nr_steps).

        Returns it, None if there was none in nr_steps, and the extent to go on from. stride must be
        coprime to nr_extents, so that a walk comes to each extent once in a round.
        """
        cursor = ffi.new("uint64_t *", at)
        found = lib.image_walk_resident(self.cdata, cursor, stride, nr_steps)
        return None if found < 0 else found, cursor[0]

    def refs(self) -> array[int]:
        """Grants outstanding per extent; O(extents)."""
        return self._counts(lib.image_refs)

    def pins(self) -> array[int]:
        """Pins per extent; O(extents)."""
        return self._counts(lib.image_pins)

    def holds(self) -> array[int]:
        """Holds per extent, each of which keeps it from eviction for a moment; O(extents)."""
        return self._counts(lib.image_holds)

    def touches(self) -> bytes:
        """Faults of each extent since the eviction policy took them, at most 3; takes none."""
        touches = bytearray(self.nr_extents)
        checked(
            lib.image_touches(self.cdata, 0, self.nr_extents, ffi.from_buffer(touches)),
            f"reading the touches of {self.label!r}",
        )
        return bytes(touches)

    def _counts(self, read: Callable[[StructImage, int, int, Array[int]], int]) -> array[int]:
        counts = array("I", bytes(4 * self.nr_extents))
        checked(
            read(self.cdata, 0, self.nr_extents, ffi.from_buffer("uint32_t[]", counts)),
            f"reading the counts of {self.label!r}",
        )
        return counts

    def extent_bytes_of(self, extent: int) -> int:
        """Bytes of frames that one extent has."""
        return min(self.extent_bytes, self.map_bytes - extent * self.extent_bytes)

    @property
    def is_remote(self) -> bool:
        """Whether its bytes are fetched from an origin: it has no file on this host."""
        return isinstance(self.source, RemoteSource)

    def look_at_source(self) -> str | None:
        """Note a change of the source's size, once; return it, or None if nothing is new.

        Only reading the source shows whether its bytes changed (content_change()). Resident extents
        stay as they are. Later loads read the source as it is now, and fail past a new end.
        """
        changed = self.source.changed()
        if changed is None or self.source_change is not None:
            return None
        self.source_change = changed
        return changed

    def content_change(
        self, digest_of: Callable[[FileSource], str], stop: Callable[[], bool] = lambda: False
    ) -> str | None:
        """Read the source; return how its bytes changed since it was opened, or None.

        Also None if stop() was true meanwhile. OSError if the source cannot be read.

        If the image's digest is known, digest_of computes the source's, or returns "" if stopped.
        Otherwise the resident extents are compared: no other bytes that guests got are known. None
        for a remote image, whose fetches compare the object's version.
        """
        if isinstance(self.source, RemoteSource):
            return None
        if self.digest:
            digest = digest_of(self.source)
            is_same = digest in ("", self.digest)
        else:
            extents = itertools.takewhile(lambda _: not stop(), range(self.nr_extents))
            is_same = all(self._is_as_in_source(extent, stop) for extent in extents)
        return None if is_same else "it was written to"

    def _is_as_in_source(self, extent: int, stop: Callable[[], bool]) -> bool:
        if self.states(extent, 1)[0] != ExtentState.RESIDENT:
            return True
        at, nr_bytes = extent * self.extent_bytes, self.extent_bytes_of(extent)
        frames = os.pread(self.frames_fd, nr_bytes, at)
        source = os.pread(self.source.fd, nr_bytes, at)
        is_same = frames == source + bytes(nr_bytes - len(source))
        # The extent may have been evicted meanwhile, and its frames with it.
        return is_same or stop() or self.states(extent, 1)[0] != ExtentState.RESIDENT

    def prefetch(self, first_extent: int, nr_extents: int) -> int:
        """Queue absent extents for loading, behind all demand; return how many were queued.

        An image may queue about an eighth of the store's capacity at a time: ask again for the
        rest.
        """
        return checked(
            lib.store_prefetch(self.cdata, first_extent, nr_extents),
            f"loading extents {first_extent}+{nr_extents} of {self.label!r}",
        )

    def wait_loaded(self, first_extent: int, nr_extents: int, timeout_ms: int) -> bool:
        """Wait until none of the extents is LOADING; False if the time ran out before."""
        return bool(lib.store_wait_loaded(self.cdata, first_extent, nr_extents, timeout_ms) == 0)

    def pin(self, first_extent: int, nr_extents: int, max_pinned_extents: int) -> None:
        """Forbid the eviction of extents, resident or not; counted.

        CapacityError, and nothing pinned, beyond max_pinned_extents in the store.
        """
        checked(
            lib.store_pin(self.cdata, first_extent, nr_extents, max_pinned_extents),
            f"pinning {nr_extents} extents of {self.label!r}",
        )

    def unpin(self, first_extent: int, nr_extents: int) -> None:
        """Take one pin back from each extent; UsageError, and nothing done, if one has none."""
        checked(
            lib.store_unpin(self.cdata, first_extent, nr_extents),
            f"unpinning {nr_extents} extents of {self.label!r}",
        )

    def collapse(self, region_no: int, max_pinned_extents: int) -> int:
        """Make the frames of 2 MiB of the image, all resident, one huge page.

        Return 0 once they are, or -errno, as image_collapse(). 0.4 to 5 ms.
        """
        return lib.image_collapse(self.cdata, region_no, max_pinned_extents)

    def is_collapsed(self, region_no: int) -> bool:
        """Whether the frames of a region are one huge page."""
        return bool(lib.image_is_collapsed(self.cdata, region_no))

    def pinned_regions(self) -> list[int]:
        """Return the regions of 2 MiB that are all resident and pinned by operators; O(extents)."""
        regions = array("I", bytes(4 * (self.nr_pages // lib.OPEN_PAGES + 1)))
        numbers = ffi.from_buffer("uint32_t[]", regions)
        nr = lib.image_pinned_regions(self.cdata, numbers, len(regions))
        return regions[:nr].tolist()

    def restore(self, extent: int) -> bool:
        """Have an extent brought back from the standby list; False if it is not there."""
        return bool(checked(lib.store_restore(self.cdata, extent), f"restoring of {self.label!r}"))

    def in_standby(self) -> bytes:
        """Return for each extent 1 if its bytes are in the standby list, else 0; O(extents)."""
        flags = bytearray(self.nr_extents)
        lib.store_in_standby(self.cdata, ffi.from_buffer("uint8_t[]", flags))
        return bytes(flags)

    def drop_standby(self, first_extent: int, nr_extents: int) -> int:
        """Drop what the standby list has of these extents, as evictions on request; in bytes."""
        nr_pages = checked(
            lib.store_drop_standby(self.cdata, first_extent, nr_extents),
            f"evicting from {self.label!r}",
        )
        return nr_pages * PAGE_BYTES

    def note_reloads(self, nr_extents: int) -> None:
        """Count extents that were loaded again soon after their eviction."""
        lib.image_note_reloads(self.cdata, nr_extents)

    def note_attach(self) -> None:
        """Count a guest that was attached."""
        lib.image_note_attach(self.cdata)

    def scrub(self) -> int:
        """Empty ABSENT extents of stray frames; return how many had some."""
        return checked(lib.store_scrub(self.cdata), f"scrubbing {self.label!r}")

    def first_touches(self) -> list[int]:
        """Extents in the order in which any guest was first granted them."""
        order = array("I", bytes(4 * self.nr_extents))
        nr = lib.image_first_touches(
            self.cdata, ffi.from_buffer("uint32_t[]", order), self.nr_extents
        )
        return order[:nr].tolist()
