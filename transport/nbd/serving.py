# SPDX-License-Identifier: Apache-2.0
"""NBD's transmission phase, served by the C core.

The negotiating server hands a socket over; from then on the core's threads own it, and report only
its end. No Python runs per request.
"""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from cowshed.cache import Image
from cowshed.cache._core import ffi, lib
from cowshed.cache.calls import CLOSED, checked
from cowshed.cache.counters import Counters

if TYPE_CHECKING:
    from cowshed.cache._core import StructOverlay

__all__ = [
    "Ended",
    "NbdCounters",
    "NbdEnd",
    "NbdExport",
    "NbdLatency",
    "NbdServer",
]

_TAKE_MAX: Final = 256
_NR_BUCKETS: Final = int(lib.LATENCY_BUCKETS)


class NbdEnd(IntEnum):
    """Why a connection ended; see nbd.h."""

    DISC = lib.NBD_END_DISC
    EOF = lib.NBD_END_EOF
    DETACHED = lib.NBD_END_DETACHED
    PROTOCOL = lib.NBD_END_PROTOCOL
    IO = lib.NBD_END_IO
    MEMORY = lib.NBD_END_MEMORY


class NbdLatency(IntEnum):
    """Reads answered from what is resident, reads that waited for a load, writes, flushes."""

    HIT = lib.NBD_LATENCY_HIT
    MISS = lib.NBD_LATENCY_MISS
    WRITE = lib.NBD_LATENCY_WRITE
    FLUSH = lib.NBD_LATENCY_FLUSH


@dataclass(frozen=True)
class Ended:
    """A connection that has ended. err is 0, or the errno its socket failed with."""

    connection_no: int
    reason: NbdEnd
    err: int


@dataclass(frozen=True)
class NbdCounters(Counters):
    """Counts of all that clients did; parked: requests that wait now. Meanings: nbd.h."""

    connections: int = 0
    reads: int = 0
    writes: int = 0
    trims: int = 0
    zeroes: int = 0
    flushes: int = 0
    caches: int = 0
    block_statuses: int = 0
    errors: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    hits: int = 0
    misses: int = 0
    parked: int = 0


class NbdServer:
    """The threads that serve connections. The owner must close exports first, then the server.

    event_fd becomes readable when connections have ended; take_ended() returns each of them once.
    """

    def __init__(self, nr_workers: int) -> None:
        server = ffi.new("struct nbd_server **")
        checked(lib.nbd_server_init(nr_workers, server), f"starting {nr_workers} NBD threads")
        self.cdata = server[0]

    @property
    def event_fd(self) -> int:
        """The eventfd; the server owns it."""
        return lib.nbd_event_fd(self.cdata)

    def attach(
        self,
        export: NbdExport,
        fd: int,
        *,
        structured: bool = False,
        extended: bool = False,
        read_only: bool = False,
        trim_zeroes: bool = False,
        context_ids: Sequence[int] = (),
        max_payload_bytes: int = 32 << 20,
        early: bytes = b"",
    ) -> int:
        """Serve a connected stream socket and return the connection's number; the core takes fd.

        context_ids: base:allocation, cowshed:resident, cowshed:private; 0 for one not negotiated.
        trim_zeroes: trimmed pages read as zeros instead of the image.
        early: bytes received after the negotiation. On an error fd stays the caller's.
        """
        negotiated = ffi.new(
            "struct nbd_negotiated *",
            {
                "structured": structured,
                "extended": extended,
                "read_only": read_only,
                "trim_zeroes": trim_zeroes,
                "max_payload_bytes": max_payload_bytes,
                "context_ids": list(context_ids),
            },
        )
        number = ffi.new("uint64_t *")
        checked(
            lib.nbd_attach(self.cdata, export.cdata, fd, negotiated, early, len(early), number),
            f"serving a client of {export.image.name!r}",
        )
        return int(number[0])

    def detach(self, connection_no: int) -> None:
        """Begin to end a connection; does nothing if it has ended already."""
        lib.nbd_detach(self.cdata, connection_no)

    def take_ended(self) -> list[Ended]:
        """Return the connections that ended since the last call."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.event_fd)
        ended = ffi.new("struct nbd_ended[]", _TAKE_MAX)
        taken: list[Ended] = []
        while nr := lib.nbd_take_ended(self.cdata, ended, _TAKE_MAX):
            taken += [
                Ended(ended[i].connection_no, NbdEnd(ended[i].reason), -ended[i].err)
                for i in range(nr)
            ]
        return taken

    def counters(self, image: Image) -> NbdCounters:
        """Return the counts of all exports of an image; a successor adopts them with the image."""
        counters = ffi.new("struct nbd_counters *")
        lib.nbd_image_count(self.cdata, image.cdata, counters)
        return NbdCounters.of(counters)

    def drain(self) -> None:
        """End every connection and wait for the last; waits for loads and disks, but no client."""
        lib.nbd_server_drain(self.cdata)

    def close(self) -> None:
        """End every connection, then the threads; UsageError while an export is open."""
        if self.cdata is not CLOSED:
            self.drain()
            checked(lib.nbd_server_deinit(self.cdata), "ending the NBD threads")
            self.cdata = CLOSED


class NbdExport:
    """An image for NBD's clients: read-only, or with an overlay (accounting.Overlay's cdata)."""

    def __init__(
        self, server: NbdServer, image: Image, overlay: StructOverlay | None = None
    ) -> None:
        export = ffi.new("struct nbd_export **")
        checked(
            lib.nbd_export_init(
                server.cdata, image.cdata, ffi.NULL if overlay is None else overlay, export
            ),
            f"exporting {image.name!r}",
        )
        self.image: Final = image
        self.cdata = export[0]

    def close(self) -> None:
        """Close the export; UsageError, with nothing changed, while a connection uses it."""
        if self.cdata is not CLOSED:
            checked(lib.nbd_export_deinit(self.cdata), f"closing an export of {self.image.name!r}")
            self.cdata = CLOSED

    def counters(self) -> NbdCounters:
        """Read its counters, not as a consistent snapshot; an overlay's outlive this process."""
        counters = ffi.new("struct nbd_counters *")
        lib.nbd_export_count(self.cdata, counters)
        return NbdCounters.of(counters)

    def latency(self, kind: NbdLatency) -> tuple[array[int], int]:
        """Return the counts by bucket (bounds: bucket_bound_ns) and the sum in nanoseconds."""
        counts = array("Q", bytes(8 * _NR_BUCKETS))
        total = ffi.new("uint64_t *")
        checked(
            lib.nbd_export_latency(self.cdata, kind, ffi.from_buffer("uint64_t[]", counts), total),
            "reading NBD latencies",
        )
        return counts, int(total[0])
