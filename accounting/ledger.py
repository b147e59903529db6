# SPDX-License-Identifier: Apache-2.0
"""A mapping's account, kept by the C core: regions, grants, private pages and counters."""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from cowshed.accounting.page_runs import PackedRuns
from cowshed.accounting.quota import Quota, QuotaPolicy
from cowshed.cache import Image, InvariantError, PeerError, UsageError
from cowshed.cache._core import ffi, lib
from cowshed.cache.calls import CLOSED, check_core, checked
from cowshed.cache.counters import Counters
from cowshed.cache.errors import PeerGoneError
from cowshed.cache.images import PAGE_BYTES

if TYPE_CHECKING:
    from cowshed.cache._core import StructAccountStatus

__all__ = [
    "MAX_REGIONS",
    "OPEN_PAGES",
    "Account",
    "AccountCounters",
    "AccountState",
    "AccountStatus",
    "CloseReason",
    "EvictReason",
    "LatencyKind",
    "Region",
    "evict",
]

MAX_REGIONS: Final = int(lib.REGIONS_MAX)
OPEN_PAGES: Final = int(lib.OPEN_PAGES)


@dataclass(frozen=True)
class Region:
    """A run of an image's pages that a guest has mapped in one piece; all in bytes."""

    address: int
    offset: int
    length: int


class LatencyKind(IntEnum):
    """Faults answered from a resident extent, after a load, and write faults."""

    HIT = lib.LATENCY_HIT
    MISS = lib.LATENCY_MISS
    WRITE = lib.LATENCY_WRITE


@dataclass(frozen=True)
class AccountCounters(Counters):
    """What was done for a guest since it attached; each only grows. Meanings: ledger.h."""

    faults_missing: int
    faults_minor: int
    faults_write: int
    misses: int
    missing_hit: int
    missing_loaded: int
    missing_failed: int
    minor_hit: int
    minor_loaded: int
    minor_failed: int
    write_copied: int
    write_refused: int
    charged_pages: int
    uncharged_pages: int
    discarded_pages: int
    mapped_pages: int
    poisoned_pages: int
    repaired_pages: int
    quota_stops: int
    retries: int
    stopped_ns: int

    @property
    def hits(self) -> int:
        """Missing and minor faults that found the extent resident."""
        return self.missing_hit + self.minor_hit

    @property
    def cow_breaks(self) -> int:
        """Pages replaced by a private copy; until a settle, some copies may not have been made."""
        return self.charged_pages - self.uncharged_pages


class CloseReason(IntEnum):
    """Why an open region was closed: its quota ran short, or the store's room; its guest's private
    pages are tracked or frozen; on request, of an eviction too; to learn whether it is used; its
    guest changed or left its memory.
    """

    QUOTA = lib.CLOSE_QUOTA
    PRESSURE = lib.CLOSE_PRESSURE
    FREEZE = lib.CLOSE_FREEZE
    REQUEST = lib.CLOSE_REQUEST
    SAMPLE = lib.CLOSE_SAMPLE
    GUEST = lib.CLOSE_GUEST


class AccountState(IntEnum):
    """State of an account: running; stopped at its quota; frozen by a drain; no longer served."""

    RUNNING = lib.ACCOUNT_RUNNING
    STOPPED = lib.ACCOUNT_STOPPED
    FROZEN = lib.ACCOUNT_FROZEN
    BROKEN = lib.ACCOUNT_BROKEN


@dataclass(frozen=True)
class AccountStatus:
    """A mapping's account, read field by field while it runs. Quota and policy are its quota's.

    stopped_since_ns is CLOCK_MONOTONIC, 0 while the guest runs. broken is 0, or -errno once its
    memory can no longer be served. frozen: writes are not answered until it is thawed. Of the
    private pages, preloaded_pages are not in its memory yet. reserved_pages are charged to it for
    its open_regions, beside the private ones; lost_regions stay pinned until it ends. account_no is
    unique in this process and never used again.
    """

    granted_extents: int
    private_pages: int
    quota_pages: int
    stopped_since_ns: int
    policy: QuotaPolicy
    broken: int
    frozen: bool
    preloaded_pages: int
    open_regions: int
    lost_regions: int
    reserved_pages: int
    account_no: int
    counters: AccountCounters

    @classmethod
    def of(cls, status: StructAccountStatus) -> AccountStatus:
        """Take a copy of a C struct account_status."""
        return cls(
            granted_extents=status.granted_extents,
            private_pages=status.private_pages,
            quota_pages=status.quota_pages,
            stopped_since_ns=status.stopped_since_ns,
            policy=QuotaPolicy(status.policy),
            broken=status.broken,
            frozen=bool(status.frozen),
            preloaded_pages=status.preloaded_pages,
            open_regions=status.open_regions,
            lost_regions=status.lost_regions,
            reserved_pages=status.reserved_pages,
            account_no=status.account_no,
            counters=AccountCounters.of(status.counters),
        )

    @property
    def state(self) -> AccountState:
        """Its state: broken counts before frozen, frozen before stopped."""
        if self.broken:
            return AccountState.BROKEN
        if self.frozen:
            return AccountState.FROZEN
        return AccountState.STOPPED if self.stopped_since_ns else AccountState.RUNNING


class Account:
    """A mapping's account with its image; open while the guest's faults are answered.

    The quota pays for its private pages; it may be closed before the account is.
    """

    def __init__(self, image: Image, quota: Quota, adopt_fd: int | None = None) -> None:
        """Open an account; or adopt the one in adopt_fd, taken over on success.

        InvariantError if adopt_fd is no account of this image.
        """
        account = ffi.new("struct account **")
        if adopt_fd is None:
            err = lib.account_open(image.cdata, quota.cdata, account)
        else:
            err = lib.account_adopt(image.cdata, quota.cdata, adopt_fd, account)
        if err == -errno.EBADMSG:
            raise InvariantError(f"the inherited ledger is not an account of image {image.label!r}")
        checked(err, f"opening an account with {image.label!r}")
        self.image: Final = image
        self.quota: Final = quota
        self.cdata = account[0]

    @property
    def fd(self) -> int:
        """The account's memfd, for the successor. Borrowed."""
        return lib.account_fd(self.cdata)

    @property
    def number(self) -> int:
        """Its AccountStatus.account_no."""
        return lib.account_number(self.cdata)

    def place(self, uffd: int, pagemap_fd: int, regions: Sequence[Region]) -> None:
        """Set where the mapping is; the descriptors are borrowed until close().

        Raises UsageError if there are too many regions, or one is unaligned, empty, outside of the
        image, or overlaps another, in the image or in the guest's memory.
        """
        table = ffi.new("struct account_region[]", max(1, len(regions)))
        for place, region in zip(table, regions, strict=False):
            if (region.address | region.offset | region.length) % PAGE_BYTES:
                raise UsageError(f"{region} is not made of whole pages of {PAGE_BYTES} bytes")
            if min(region.address, region.offset, region.length) < 0 or (
                max(region.address, region.offset, region.length) >> 63
            ):
                raise UsageError(f"{region} is out of the range of addresses")
            place.address = region.address
            place.first_page = region.offset // PAGE_BYTES
            place.nr_pages = region.length // PAGE_BYTES
        result = lib.account_place(self.cdata, uffd, pagemap_fd, table, len(regions))
        if result == -errno.E2BIG:
            raise UsageError(f"{len(regions)} regions are too many; give {MAX_REGIONS} at most")
        if result == -errno.EINVAL:
            raise UsageError(
                f"regions that are empty, overlap, or reach beyond the {self.image.map_bytes} "
                f"bytes of {self.image.name!r}; give parts of it, each mapped once"
            )
        checked(result, "placing an account")

    def regions(self) -> list[Region]:
        """Where the mapping is now, in the order of the image's pages."""
        table = ffi.new("struct region_table *")
        lib.account_regions(self.cdata, table)
        return [
            Region(region.address, region.first_page * PAGE_BYTES, region.nr_pages * PAGE_BYTES)
            for region in table.regions[0 : table.nr]
        ]

    def find_present(self, page: int, nr_max: int) -> tuple[int, bool | None]:
        """Look for a page, from that one on, that the guest's userfaultfd still guards.

        Returns the page and True; the image's number of pages and False if there is none; the page
        to go on from and None after nr_max looks. Each look takes about 1 us.
        """
        place = ffi.new("uint64_t *", page)
        found = lib.account_find_present(self.cdata, nr_max, place)
        return int(place[0]), None if found == -errno.EAGAIN else bool(found)

    def close(self) -> None:
        """Return every grant and charge; the guest's fault thread must have been stopped."""
        if self.cdata is not CLOSED:
            lib.account_close(self.cdata)
            self.cdata = CLOSED

    def status(self) -> AccountStatus:
        """Read the account; private_pages may be ahead of the kernel by charges not settled."""
        status = ffi.new("struct account_status *")
        lib.account_read(self.cdata, status)
        return AccountStatus.of(status)

    def check(self) -> None:
        """Recompute the invariants of a mapping's account; O(pages). Raises InvariantError."""
        check_core(lib.account_check(self.cdata))

    def settle(self) -> None:
        """Give back charges whose copies never happened, so that charged means copied.

        If the guest's page tables cannot be read (it is going away) the charges stand.
        """
        lib.account_settle(self.cdata)

    @property
    def nr_regions(self) -> int:
        """The number of regions of the image; the last is never open if it is short."""
        return -(-self.image.nr_pages // OPEN_PAGES)

    def open_region(self, region_no: int, spare_pages: int, max_pinned_extents: int) -> int:
        """Let the kernel map a region for the guest by itself, if its frames are collapsed.

        Return 0 once it is open, or -errno if it is not opened, as account_open_region() does. All
        its pages are charged, with spare_pages of the quota left; its extents are pinned, with no
        more than max_pinned_extents in the store. About 10 us.
        """
        return lib.account_open_region(self.cdata, region_no, spare_pages, max_pinned_extents)

    def close_regions(self, reason: CloseReason, first: int = 0, nr: int | None = None) -> int:
        """Close the open ones of nr regions from first, exactly charged; return how many.

        PeerError if the guest does not let them be closed within a second: some may stay open.
        """
        nr = self.nr_regions - first if nr is None else nr
        result = lib.account_close_regions(self.cdata, first, nr, reason)
        if result == -errno.EAGAIN:
            raise PeerError("closing regions: the guest's memory is changing all the time")
        return checked(result, "closing regions")

    def open_regions(self) -> list[int]:
        """Return the numbers of the open regions."""
        words = bytearray(8 * ((self.nr_regions + 63) // 64))
        checked(
            lib.account_open_bitmap(
                self.cdata, ffi.from_buffer("uint64_t[]", words), len(words) // 8
            ),
            "reading open regions",
        )
        bits = int.from_bytes(words, "little")
        return [no for no in range(self.nr_regions) if bits >> no & 1] if bits else []

    def take_wanted(self, nr_max: int) -> list[int]:
        """Take up to nr_max regions that the fault thread found worth opening."""
        regions = array("I", bytes(4 * nr_max))
        nr = lib.account_take_wanted(self.cdata, ffi.from_buffer("uint32_t[]", regions), nr_max)
        return regions[:nr].tolist()

    def shrink(self) -> None:
        """Close regions while the quota has no room: after it was made smaller."""
        lib.account_shrink(self.cdata)

    def set_read_only(self, read_only: bool) -> None:
        """State whether the guest writes its mapping: if not, open regions are not charged.

        Closes all regions. PeerError, and nothing is changed, if the guest does not let them be
        closed within a second.
        """
        if lib.account_set_read_only(self.cdata, int(read_only)) == -errno.EAGAIN:
            raise PeerError("closing regions: the guest's memory is changing all the time")

    def finish_opening(self) -> None:
        """Check the region that was being opened when the predecessor ended."""
        lib.account_finish_opening(self.cdata)

    def reserved_bitmap(self) -> bytes:
        """Copy the bitmap of pages that are charged with open regions, and not seen as copied."""
        words = bytearray(8 * ((self.image.nr_pages + 63) // 64))
        lib.account_reserved_bitmap(
            self.cdata, ffi.from_buffer("uint64_t[]", words), len(words) // 8
        )
        return bytes(words)

    def adopt_private(self) -> int:
        """Charge private pages inherited over fork, past the quota too; return how many.

        Its faults must be answered already. OSError if its page tables cannot be read.
        """
        result = lib.account_adopt_private(self.cdata)
        if result < 0:
            raise OSError(-result, "looking at inherited memory")
        return result

    def take_dirty(self) -> bytes:
        """Take the pages that became private, were written, or are private no more, as a bitmap.

        That is, since the last call; the first call (after FaultHandler.track) returns all private
        ones. Writes are tracked again before this returns: a page read afterwards has every byte,
        or is dirty again. A discard may be noticed only some microseconds after it.

        UsageError if they are not tracked, PeerGoneError if the memory is gone, PeerError if the
        guest does not let them be protected; after any error they are all still dirty. About
        0.05 us for each page.
        """
        words = bytearray(8 * ((self.image.nr_pages + 63) // 64))
        result = lib.account_take_dirty(
            self.cdata, ffi.from_buffer("uint64_t[]", words), len(words) // 8
        )
        if result == -errno.EINVAL:
            raise UsageError("its private pages are not tracked; have its handler track() them")
        if result == -errno.ESRCH:
            raise PeerGoneError("protecting written pages: the guest's memory is gone")
        if -result in (errno.ENOENT, errno.EAGAIN):
            raise PeerError(f"protecting written pages: {os.strerror(-result)}")
        checked(result, "taking dirty pages")
        return bytes(words)

    def load_runs(
        self, mem_fd: int, runs: PackedRuns, to: memoryview, *, is_frozen: bool
    ) -> list[int]:
        """Copy the pages of runs, one after another, out of the guest's memory.

        mem_fd is its /proc/PID/mem. Returns the pages that the guest discarded or moved meanwhile:
        they came as zeros, and must be read again. PeerGoneError if the memory is gone, PeerError
        if a page is not mapped. OSError if one cannot be read; is_frozen: a discarded one, too.
        """
        nr_pages = runs.check(self.image.nr_pages)
        assert len(to) == nr_pages * PAGE_BYTES
        unread = bytearray(nr_pages)
        nr = lib.account_load(
            self.cdata,
            mem_fd,
            ffi.from_buffer(runs.raw),
            len(runs),
            int(is_frozen),
            ffi.from_buffer(to),
            ffi.from_buffer(unread),
        )
        if nr == -errno.ESRCH:
            raise PeerGoneError("reading private pages: its memory is gone")
        if nr == -errno.ENXIO:
            raise PeerError("it unmapped private pages")
        if nr < 0:
            raise OSError(-nr, os.strerror(-nr))
        if nr == 0:
            return []
        pages = (page for first, nr in runs for page in range(first, first + nr))
        return [page for page, is_unread in zip(pages, unread, strict=True) if is_unread]

    def preload(self, source_fd: int, bitmap: bytes) -> int:
        """Make pages private whose bytes a file has at their image offsets; return how many.

        They are charged at once, past the quota too, and copied into the guest's memory as it
        touches them, or when its fault thread is idle. Pages that the mapping does not have are
        left out. The account must have been placed, and its faults must not be answered yet.
        source_fd stays the caller's. UsageError if the file is shorter than the image, or this was
        done before.
        """
        nr_words = (self.image.nr_pages + 63) // 64
        words = bytearray(bitmap.ljust(8 * nr_words, b"\0"))
        return checked(
            lib.account_preload(
                self.cdata, source_fd, ffi.from_buffer("uint64_t[]", words), len(words) // 8
            ),
            f"preloading an account with {self.image.label!r}",
        )

    def adopt_preloaded(self, source_fd: int) -> None:
        """Give an adopted account its preload file, before its faults are answered."""
        checked(lib.account_adopt_preloaded(self.cdata, source_fd), "adopting preloaded pages")

    def copy_preload_fd(self) -> int:
        """Duplicate the descriptor of the preload file; -1 if no preloaded pages are left.

        The caller closes the copy. Raises CapacityError if no descriptor is left.
        """
        fd = lib.account_copy_preload_fd(self.cdata)
        return -1 if fd == -errno.ENOENT else checked(fd, "copying a preload file's descriptor")

    def count_quota(self) -> tuple[int, int]:
        """Return the pages charged to the accounts of its quota, and the quota's used pages.

        Both must be the same number. Waits for each account; writes wait meanwhile, for
        microseconds per GiB.
        """
        used = ffi.new("uint64_t *")
        counted = lib.account_quota_pages(self.cdata, used)
        return counted, int(used[0])

    def add_grants(self, refs: array[int]) -> None:
        """Add this account's grants to refs, an array of one count per extent."""
        checked(
            lib.account_add_grants(
                self.cdata, 0, self.image.nr_extents, ffi.from_buffer("uint32_t[]", refs)
            ),
            "reading grants",
        )

    def private_bitmap(self) -> bytes:
        """Copy the bitmap of charged pages: bit i % 8 of byte i // 8 is page i."""
        return self._bitmap(unsettled=False)

    def unsettled_bitmap(self) -> bytes:
        """Copy the bitmap of charged pages whose copies were not seen yet."""
        return self._bitmap(unsettled=True)

    def _bitmap(self, *, unsettled: bool) -> bytes:
        nr_words = (self.image.nr_pages + 63) // 64
        words = bytearray(8 * nr_words)
        checked(
            lib.account_bitmap(
                self.cdata, int(unsettled), ffi.from_buffer("uint64_t[]", words), nr_words
            ),
            "reading private pages",
        )
        return bytes(words)

    def looks(self) -> bytes:
        """Read how every page is mapped: a PAGE_LOOK_* value each; OSError if that fails."""
        looks = bytearray(self.image.nr_pages)
        result = lib.account_look(self.cdata, 0, self.image.nr_pages, ffi.from_buffer(looks))
        if result < 0:
            raise OSError(-result, "PAGEMAP_SCAN")
        return bytes(looks)


class EvictReason(IntEnum):
    """Why extents are evicted; evictions are counted by reason.

    With the last two their bytes go to the standby list: to make room, or as a sample.
    """

    PRESSURE = lib.EVICT_PRESSURE
    REQUEST = lib.EVICT_REQUEST
    STANDBY = lib.EVICT_STANDBY
    SAMPLE = lib.EVICT_SAMPLE


def evict(image: Image, extents: list[int], reason: EvictReason = EvictReason.REQUEST) -> list[int]:
    """Punch those extents that may be evicted, revoke their grants, and return them.

    Pinned, held and absent ones stay as they are.
    """
    victims = array("I", extents)
    nr = checked(
        lib.evict_extents(
            image.cdata, ffi.from_buffer("uint32_t[]", victims), len(victims), reason
        ),
        f"evicting from {image.name!r}",
    )
    return victims[:nr].tolist()
