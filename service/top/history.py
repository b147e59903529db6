# SPDX-License-Identifier: Apache-2.0
"""Compute the rates of `cowshed top` from successive status objects.

Pure: the caller passes the time of each status.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from cowshed.service.reports.wording import hit_rate, key_of

Answer = Mapping[str, Any]

NR_SAMPLES = 240  # four minutes, and as wide as any terminal shows
NR_GUEST_SAMPLES = 40
_COUNTERS = ("hits", "misses", "loads", "load_bytes", "evicted_extents", "cow_breaks")
_GUEST_COUNTERS = ("hits", "misses", "cow_breaks")
_IMAGE_COUNTERS = ("loads",)


class History:
    """Rates between the two newest status objects, and earlier rates as far as they are drawn.

    Invariants: `hit_rates` (estimates over 60 s) and `fault_rates` are equally long, at most
    NR_SAMPLES, oldest first, a hit rate None where it was not known; `guest_faults` has the guests
    of the newest status and no others; rates are of one daemon: counters that went back, or another
    pid, start afresh.
    """

    def __init__(self) -> None:
        self.hit_rates: deque[float | None] = deque(maxlen=NR_SAMPLES)
        self.fault_rates: deque[float] = deque(maxlen=NR_SAMPLES)
        self.guest_faults: dict[str, deque[float]] = {}
        self._older: dict[str, int] = {}
        self._newer: dict[str, int] = {}
        self._seconds = 0.0
        self._newer_ns = 0
        self._pid: int | None = None

    def observe(self, status: Answer, now_ns: int) -> None:
        """Add `status`, taken at `now_ns` of a monotonic clock."""
        counters = {name: int(status[name]) for name in _COUNTERS}
        for kind, names in (("guest", _GUEST_COUNTERS), ("image", _IMAGE_COUNTERS)):
            for one in status[f"{kind}s"]:
                for name in names:
                    counters[_key(name, kind, key_of(one))] = one[name]
        restarted = self._pid != status["pid"] or counters["hits"] < self._newer.get("hits", 0)
        if restarted:
            self.hit_rates.clear()
            self.fault_rates.clear()
            self.guest_faults.clear()
        self._older = {} if restarted else self._newer
        self._seconds = (now_ns - self._newer_ns) / 1e9
        self._newer, self._newer_ns, self._pid = counters, now_ns, status["pid"]
        self._remember((key_of(guest) for guest in status["guests"]), hit_rate(status, 60))

    def rate(self, *names: str, guest: str | None = None, image: str | None = None) -> float | None:
        """Return the growth per second of the sum of these counters; None before two samples.

        A guest or an image is named by its key_of.
        """
        if not self._older or self._seconds <= 0:
            return None
        kind, one = ("guest", guest) if guest is not None else ("image", image)
        keys = names if one is None else [_key(name, kind, one) for name in names]
        return sum(self._gained(key) for key in keys) / self._seconds

    def _remember(self, guests: Iterable[str], estimate: float | None) -> None:
        faults = self.rate("hits", "misses")
        if faults is not None:
            self.hit_rates.append(estimate)
            self.fault_rates.append(faults)
        kept: dict[str, deque[float]] = {}
        for guest in guests:
            kept[guest] = self.guest_faults.get(guest) or deque(maxlen=NR_GUEST_SAMPLES)
            rate = self.rate("hits", "misses", guest=guest)
            if rate is not None:
                kept[guest].append(rate)
        self.guest_faults = kept

    def _gained(self, key: str) -> int:
        """Return how much a counter grew; a new one, or one that went back, counts from 0."""
        newer, older = self._newer.get(key, 0), self._older.get(key, 0)
        return newer - older if newer >= older else newer


def _key(name: str, kind: str, one: str) -> str:
    return f"{name} {kind} {one}"
