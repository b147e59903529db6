# SPDX-License-Identifier: Apache-2.0
"""Loads of images whose bytes come from elsewhere, as the threads that fetch them see it: fetch.h.

A thread takes a fetch from a queue, gives its bytes in order, and ends it. No call holds the GIL
while it waits or writes frames.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cowshed.cache._core import ffi, lib
from cowshed.cache.calls import CLOSED, checked
from cowshed.cache.counters import Counters
from cowshed.cache.errors import UsageError

if TYPE_CHECKING:
    from cowshed.cache._core import StructFetch, StructOrigin, StructStore

__all__ = ["FETCH_BLOCK_BYTES", "FETCH_BYTES_MAX", "Fetch", "FetchCounters", "FetchQueue"]

# The aligned block around an extent that is fetched on demand, and the most of one prefetch; of
# images whose extents are larger, one extent.
FETCH_BLOCK_BYTES: Final = 1 << 20
FETCH_BYTES_MAX: Final = 4 << 20


@dataclass(frozen=True)
class FetchCounters(Counters):
    """A queue at one instant: loads that wait, and fetches taken and not ended."""

    queued_demand: int
    queued_prefetch: int
    fetches: int


class Fetch:
    """Bytes of an image that its taker must give, from offset_bytes on, and then end().

    is_prefetch: nobody waited for them when the fetch was taken.
    """

    def __init__(
        self,
        cdata: StructFetch,
        image_no: int,
        offset_bytes: int,
        length_bytes: int,
        *,
        is_prefetch: bool,
    ) -> None:
        self._cdata = cdata
        self.image_no: Final = image_no
        self.offset_bytes: Final = offset_bytes
        self.length_bytes: Final = length_bytes
        self.is_prefetch: Final = is_prefetch

    def fill(self, chunk: bytes | memoryview) -> bool:
        """Give the next bytes; each extent that they complete is published at once.

        Returns False, and does nothing, once the image was closed. Raises UsageError, and does
        nothing, for more bytes than are left.
        """
        err = lib.store_fill(self._cdata, ffi.from_buffer(chunk), len(chunk))
        if err == -errno.EMSGSIZE:
            raise UsageError(
                f"{len(chunk)} bytes are more than a fetch of {self.length_bytes} bytes has left"
            )
        return err != -errno.ECANCELED and checked(err, "filling a fetch") == 0

    def end(self, err: int = 0) -> None:
        """End the fetch, once; extents whose bytes were not given fail with err, or ENODATA."""
        cdata, self._cdata = self._cdata, CLOSED
        lib.store_fetch_end(cdata, err)


class FetchQueue:
    """The loads of some images of a store, for threads that fetch. Close it after the images.

    Made by PageStore.open_queue.
    """

    def __init__(self, store: StructStore) -> None:
        queue = ffi.new("struct origin **")
        checked(lib.origin_open(store, queue), "opening a queue of fetches")
        self._cdata: StructOrigin = queue[0]

    @property
    def cdata(self) -> StructOrigin:
        """The core's queue, for the store."""
        return self._cdata

    def take(self, timeout_seconds: float, *, demand_only: bool = False) -> Fetch | None:
        """Wait for a load and take it, with its room; None if there is none, or after stop().

        Loads that guests wait for go first; demand_only leaves the others to other threads.
        CapacityError if there is no memory for it.
        """
        fetch, request = ffi.new("struct fetch **"), ffi.new("struct fetch_request *")
        timeout_ms = int(timeout_seconds * 1000)
        err = lib.store_take_fetch(self._cdata, demand_only, timeout_ms, fetch, request)
        if err in (-errno.ETIMEDOUT, -errno.ESHUTDOWN):
            return None
        checked(err, "taking a fetch")
        return Fetch(
            fetch[0],
            request.image_no,
            request.offset_bytes,
            request.length_bytes,
            is_prefetch=bool(request.is_prefetch),
        )

    def stop(self) -> None:
        """End all waits in take(), now and from now on. Fetches in hand go on."""
        lib.origin_stop(self._cdata)

    def counters(self) -> FetchCounters:
        """Read the counters, all at one instant."""
        counters = ffi.new("struct origin_counters *")
        lib.origin_count(self._cdata, counters)
        return FetchCounters.of(counters)

    def close(self) -> bool:
        """Close the queue; False, and nothing done, while a fetch is in hand or images have it."""
        if self._cdata is CLOSED:
            return True
        if lib.origin_close(self._cdata) == -errno.EBUSY:
            return False
        self._cdata = CLOSED
        return True
