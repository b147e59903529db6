# SPDX-License-Identifier: Apache-2.0
"""The status object: the daemon's current state, as `cowshed status --json` prints it."""

from __future__ import annotations

import errno
import functools
import operator
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final, Protocol

from cowshed.accounting import (
    MAX_REGIONS,
    AccountCounters,
    AccountStatus,
    AccountSums,
    CloseReason,
    Latency,
    LatencyKind,
    MissingPages,
    Use,
    read_latency,
    sum_accounts,
)
from cowshed.cache import Image, ImageCounters, PageStore
from cowshed.service.guests.guests import Guest, GuestTable
from cowshed.service.guests.states import STATE_WORDS
from cowshed.service.images.evictor import Evictor
from cowshed.service.images.warming import Warm, Warming
from cowshed.service.overlays.overlays import OverlayGuest, OverlayTable
from cowshed.service.runtime.version import VERSION
from cowshed.service.settings.config import Config
from cowshed.service.supervise.history import RestartHistory

__all__ = ["StatusReader", "broken_why", "guest_state"]

_PAGE_BYTES: Final = 4096


class StatusSources(Protocol):
    """The parts of a Host that the status is read from."""

    @property
    def config(self) -> Config: ...
    @property
    def store(self) -> PageStore: ...
    @property
    def evictor(self) -> Evictor: ...
    @property
    def guests(self) -> GuestTable: ...
    @property
    def overlays(self) -> OverlayTable: ...
    @property
    def warming(self) -> Warming: ...
    @property
    def history(self) -> RestartHistory: ...


class StatusReader:
    """Makes the status object from the store, the guests and the overlays."""

    def __init__(
        self,
        host: StatusSources,
        *,
        drain: Callable[[], dict[str, Any] | None] = lambda: None,
        unserved: Callable[[], list[dict[str, Any]]] = list,
        unserved_listeners: Callable[[], list[dict[str, Any]]] = list,
        source_wait_seconds: Callable[[Image], float] = lambda _: 0.0,
        use: Callable[[Image | None], list[Use]] = lambda _: [],
        why_unknown: Callable[[], str] = str,
    ) -> None:
        """drain() returns the drain in progress or the last one; None if there was none.

        unserved() and unserved_listeners() return the images and listeners of the configuration
        that cannot be served, and why. source_wait_seconds(image) is how long the oldest read or
        check of its source has been unanswered. use(image) estimates what guests use of an image,
        or of all; why_unknown() says why, if it does not.
        """
        self._use = use
        self._why_unknown = why_unknown
        self._store = host.store
        self._evictor = host.evictor
        self._guests = host.guests
        self._overlays = host.overlays
        self._run_dir = host.config.run_dir
        self._warming = host.warming
        self._history = host.history
        self._drain = drain
        self._unserved = unserved
        self._unserved_listeners = unserved_listeners
        self._source_wait_seconds = source_wait_seconds
        self._started_ns = time.monotonic_ns()

    def read(self) -> dict[str, Any]:
        """Return the status object; settles every guest's charges first.

        Cost: about a millisecond per guest that wrote lately and GiB of image.
        """
        with self._guests.lock:
            guests = []
            for guest in self._guests:
                guest.settle()
                if status := guest.status():
                    guests.append(_guest_status(guest, status))
            sums = [sum_accounts(image) for image in self._store]
        with self._overlays.lock:
            guests += [_overlay_status(guest) for guest in self._overlays]
        counted = (of_image.counters for of_image in sums)
        totals = functools.reduce(operator.add, counted, AccountCounters.none())
        latencies = {
            kind: functools.reduce(
                operator.add,
                (of_image.latencies[kind] for of_image in sums),
                read_latency((), kind),
            )
            for kind in LatencyKind
        }
        images = [
            {
                **_image_status(image),
                "source_wait_seconds": self._source_wait_seconds(image),
                "use": [_use_status(use) for use in self._use(image)],
                "warming": _warming_status(self._warming.of(image)),
            }
            for image in self._store
        ]
        counters = [image.counters() for image in self._store]
        of_store = self._store.counters()
        return {
            "pid": os.getpid(),
            "version": VERSION,
            "run_dir": str(self._run_dir),
            "uptime_seconds": (time.monotonic_ns() - self._started_ns) / 1e9,
            **self._history.status(),
            "capacity_bytes": self._store.capacity_bytes,
            "resident_bytes": sum(image["resident_bytes"] for image in images),
            "saved_bytes": sum(image["saved_bytes"] for image in images),
            "standby": {
                "bytes": of_store.standby_extents * self._store.extent_bytes,
                "limit_bytes": of_store.standby_limit * self._store.extent_bytes,
                "victims": sum(counter.standby_unmaps for counter in counters),
                "victim_hits": sum(c.soft_hits - c.sample_hits for c in counters),
                "samples": sum(counter.standby_samples for counter in counters),
                "sample_hits": sum(counter.sample_hits for counter in counters),
            },
            "open_regions": _regions_status(sums, counters),
            "use": [_use_status(use) for use in self._use(None)],
            "use_unknown_because": self._why_unknown(),
            "hits": totals.hits,
            "misses": totals.misses,
            # Summed from the settled values above: a new sum would include unsettled charges.
            "cow_breaks": sum(guest["cow_breaks"] for guest in guests)
            + sum(of_image.closed_cow_pages for of_image in sums),
            "evicted_extents": sum(counter.evictions for counter in counters),
            "evictions": {
                "pressure": sum(counter.evictions_pressure for counter in counters),
                "request": sum(counter.evictions_request for counter in counters),
            },
            "loads": sum(counter.loads for counter in counters),
            "load_bytes": sum(counter.load_bytes for counter in counters),
            "load_errors": sum(counter.load_errors for counter in counters),
            "faults": {
                "missing": totals.faults_missing,
                "minor": totals.faults_minor,
                "write": totals.faults_write,
            },
            "latency_us": {
                kind.name.lower(): _latency_us(latency) for kind, latency in latencies.items()
            },
            "drain": self._drain(),
            "images": images,
            "unserved_images": self._unserved(),
            "unserved_listeners": self._unserved_listeners(),
            "guests": guests,
        }


def _regions_status(sums: list[AccountSums], counters: list[ImageCounters]) -> dict[str, Any]:
    """Add up the open regions of all images."""
    return {
        "open": sum(of_image.open_regions for of_image in sums),
        "lost": sum(of_image.lost_regions for of_image in sums),
        "reserved_bytes": sum(of_image.reserved_pages for of_image in sums) * _PAGE_BYTES,
        "opens": sum(of_image.opens for of_image in sums),
        "closes": {
            reason.name.lower(): sum(of_image.closes[reason] for of_image in sums)
            for reason in CloseReason
        },
        "collapse_failures": sum(of_image.collapse_failures for of_image in counters),
    }


def _use_status(use: Use) -> dict[str, Any]:
    """Describe an estimate; None stands for what is not known."""
    return {
        "window_seconds": use.window_seconds,
        "hit_rate": use.hit_rate and asdict(use.hit_rate),
        "working_set_bytes": use.working_set_bytes and asdict(use.working_set_bytes),
        "hit_rate_at": use.hit_rate_at and {f"{at:g}": hit for at, hit in use.hit_rate_at.items()},
    }


def _latency_us(latency: Latency) -> dict[str, float]:
    percentiles = {"p50": 50, "p90": 90, "p99": 99, "max": 100}
    figures = {name: latency.percentile_ns(percent) / 1000 for name, percent in percentiles.items()}
    return {**figures, "count": latency.count}


def guest_state(status: AccountStatus) -> str:
    """Return the name of a guest's state."""
    return STATE_WORDS[status.state]


def _state_of(guest: Guest | OverlayGuest, status: AccountStatus) -> str:
    state = guest_state(status)
    return (
        "parked" if state == "running" and isinstance(guest, Guest) and guest.is_parked else state
    )


def _overlay_status(guest: OverlayGuest) -> dict[str, Any]:
    """Return the status of a guest that maps nothing: hits and misses are those of its requests."""
    counters = guest.export.counters()
    status = guest.account.status()
    missing = MissingPages(guest.overlay)
    return {
        **_guest_status(guest, status),
        # Of the private bytes: those that are missing, and of these, those that are lost.
        "late_bytes": missing.nr_left * _PAGE_BYTES,
        "lost_bytes": missing.nr_lost * _PAGE_BYTES,
        "state": "frozen" if status.frozen else guest.state,
        "clients": guest.nr_clients,
        "hits": counters.hits,
        "misses": counters.misses,
    }


def broken_why(status: AccountStatus) -> str:
    """Return why a mapping cannot be served any more."""
    if status.broken == -errno.EXDEV:
        return f"it split its mapping into more than {MAX_REGIONS} regions"
    return f"its memory cannot be served: {os.strerror(-status.broken)}"


def _guest_status(guest: Guest | OverlayGuest, status: AccountStatus) -> dict[str, Any]:
    counters = status.counters
    stopped_ns = status.stopped_since_ns
    return {
        "name": guest.name,
        "image": guest.image.name,
        "domain": guest.image.domain,
        "transport": guest.transport,
        "state": _state_of(guest, status),
        "pid": guest.pid,
        "mappings": len(guest.mappings) if isinstance(guest, Guest) else 0,
        "parked_mappings": (
            sum(each.is_parked for each in guest.mappings) if isinstance(guest, Guest) else 0
        ),
        "uid": guest.uid,
        "granted_bytes": guest.granted_bytes(status),
        "private_bytes": status.private_pages * _PAGE_BYTES,
        # Charged beside the private bytes, for open regions.
        "reserved_bytes": status.reserved_pages * _PAGE_BYTES,
        "open_regions": status.open_regions,
        "lost_regions": status.lost_regions,
        "quota_bytes": guest.quota_bytes,
        "policy": status.policy.name.lower(),
        "hits": counters.hits,
        "misses": counters.misses,
        "cow_breaks": counters.cow_breaks,
        "faults": {
            "missing": counters.faults_missing,
            "minor": counters.faults_minor,
            "write": counters.faults_write,
        },
        "poisoned_pages": counters.poisoned_pages - counters.repaired_pages,
        "quota_stops": counters.quota_stops,
        "stopped_seconds": (time.monotonic_ns() - stopped_ns) / 1e9 if stopped_ns else 0.0,
    }


def _warming_status(warms: list[Warm]) -> dict[str, Any] | None:
    """Return the sum of an image's warm-ups whose total is known; None if there are none."""
    known = [warm for warm in warms if warm.total_bytes is not None]
    if not known:
        return None
    return {
        "why": sorted({warm.why for warm in known}),
        "done_bytes": sum(warm.done_bytes for warm in known),
        "total_bytes": sum(warm.total_bytes or 0 for warm in known),
    }


def _image_status(image: Image) -> dict[str, Any]:
    statistics = image.statistics()
    counters = image.counters()
    return {
        "name": image.name,
        "domain": image.domain,
        "size_bytes": image.size_bytes,
        "resident_bytes": image.resident_bytes,
        "digest": image.digest,
        "source": str(image.source.path),
        "source_changed": bool(image.source_change),
        # Whether the path names the "same" file, an "other" one, or none ("gone").
        "source_at_path": image.source_at_path,
        "extent_bytes": image.extent_bytes,
        "pinned_bytes": statistics.pinned_bytes,
        # The memory that frames of its own for each guest would take, less what they take now.
        "saved_bytes": statistics.saved_bytes,
        "refs": sum(image.refs()),
        "loads": counters.loads,
        "load_errors": counters.load_errors,
        "working_set_bytes": statistics.touched_bytes,
    }
