# SPDX-License-Identifier: Apache-2.0
"""What guests use of images: hit rate and working set, from probes and counters, over a window.

Probes show what guests do with extents that are in memory, which is silent (sampling.py). Counters
show the rest: loads, and soft hits. All is of uses of extents, not of faults.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from cowshed.accounting.policy.sampling import (
    Estimate,
    Exposure,
    Load,
    Probe,
    hit_rate_with,
    touch_rate,
    touched_share,
)

WINDOWS_SECONDS: Final = (10, 60, 300)
CAPACITY_FACTORS: Final = (0.5, 1.0, 2.0)
"""The capacities, as multiples of today's, that hit rates are estimated for."""
STAY_PARTS: Final = 4
"""Touches within one in so many of the time that extents stay in the frames count for the rate."""
_KEPT: Final = 4096


@dataclass(frozen=True, slots=True)
class Use:
    """What guests used in a window: None is unknown.

    hit_rate: of the uses of extents, those that found them in memory, 0 to 1. working_set_bytes:
    what was used at least once. hit_rate_at: the hit rate with a capacity of each of
    CAPACITY_FACTORS, of all images only, which share it.
    """

    window_seconds: int
    hit_rate: Estimate | None
    working_set_bytes: Estimate | None
    hit_rate_at: dict[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    """An image's counters at a time, in extents; all but resident_bytes only grow."""

    at: float
    demand_loads: int
    prefetch_loads: int
    soft_hits: int
    reloads: int
    unmaps: int
    resident_bytes: int


@dataclass
class Observed:
    """What is known of one image: probes with the times of their ends, counters once a second."""

    exposures: deque[tuple[float, Exposure]] = field(default_factory=lambda: deque(maxlen=_KEPT))
    probes: deque[tuple[float, Probe]] = field(default_factory=lambda: deque(maxlen=_KEPT))
    counts: deque[Counts] = field(default_factory=lambda: deque(maxlen=WINDOWS_SECONDS[-1] + 2))
    size_bytes: int = 0


def estimate_use(
    images: Sequence[Observed],
    out: Iterable[Probe],
    window_seconds: int,
    now: float,
    extent_bytes: int,
    capacity_extents: int | None,
) -> Use:
    """Estimate use over the window that ends now, of one image or of several together; O(probes).

    out: the probes under way, as ended now without a touch. capacity_extents: None for one image.
    Pinned extents are never probed; they are taken to be used as the others are.
    """
    since = now - window_seconds
    seen = Seen()
    for image in images:
        seen.add(image, since)
    resident = seen.resident_bytes / extent_bytes
    if not resident or not seen.seconds:
        return Use(window_seconds, None, None)
    exposures = [exposure for image in images for at, exposure in image.exposures if at >= since]
    long = [probe for image in images for at, probe in image.probes if at >= since - window_seconds]
    probes = [*(exposure.first for exposure in exposures), *long, *out]
    hit_rate = working_set = hit_rate_at = None
    rate = touch_rate(exposures, resident, seen.stay_seconds(resident) / STAY_PARTS)
    if rate is not None:
        silent = rate.times(resident)
        loads = [seen.load(uses) for uses in (silent.value, silent.low, silent.high)]
        if loads[0].uses > 0:
            hit_rate = Estimate(*(load.hit_rate if load.uses else 1.0 for load in loads))
        if capacity_extents is not None and hit_rate is not None:
            of_all = seen.size_bytes / extent_bytes
            at = {
                factor: hit_rate_with(factor, loads[0], probes, resident, capacity_extents, of_all)
                for factor in CAPACITY_FACTORS
            }
            hit_rate_at = {factor: found for factor, found in at.items() if found is not None}
    share = touched_share(probes, window_seconds)
    if share is not None:
        used = [
            seen.used_bytes(each, extent_bytes) for each in (share.value, share.low, share.high)
        ]
        working_set = Estimate(*used)
    return Use(window_seconds, hit_rate, working_set, hit_rate_at)


@dataclass
class Seen:
    """What the counters of some images tell of a window; loads, hits and unmaps in extents."""

    seconds: float = 0.0
    demanded: float = 0.0
    prefetched: float = 0.0
    soft: float = 0.0
    reloads: float = 0.0
    unmaps: float = 0.0
    resident_bytes: float = 0.0
    resident_last_bytes: int = 0
    size_bytes: int = 0

    def add(self, image: Observed, since: float) -> None:
        """Add an image, as far as it was there: resident_bytes on average over the window."""
        if not image.counts:
            return
        within = [counts for counts in image.counts if counts.at >= since] or [image.counts[-1]]
        first, last = within[0], within[-1]
        self.seconds = max(self.seconds, last.at - first.at)
        self.demanded += last.demand_loads - first.demand_loads
        self.prefetched += last.prefetch_loads - first.prefetch_loads
        self.soft += last.soft_hits - first.soft_hits
        self.reloads += last.reloads - first.reloads
        self.unmaps += last.unmaps - first.unmaps
        self.resident_bytes += sum(counts.resident_bytes for counts in within) / len(within)
        self.resident_last_bytes += last.resident_bytes
        self.size_bytes += image.size_bytes

    def stay_seconds(self, resident: float) -> float:
        """Return how long an extent stays in the frames on average, if so many are there."""
        return resident * self.seconds / self.unmaps if self.unmaps else math.inf

    def load(self, silent: float) -> Load:
        """Return the load per second if mapped extents are used `silent` times a second."""
        return Load(
            silent,
            self.soft / self.seconds,
            self.demanded / self.seconds,
            self._reloads_of(self.demanded) / self.seconds,
        )

    def used_bytes(self, share: float, extent_bytes: int) -> float:
        """Return the bytes used at least once if guests used that share of what is resident.

        To those come the extents that were loaded because a guest waited, and those that were
        loaded ahead and are gone: reloads once, and those that are resident still not twice.
        """
        demanded = self.demanded - self._reloads_of(self.demanded)
        ahead = self.prefetched - self._reloads_of(self.prefetched)
        gone = max(0.0, self.unmaps - self.soft)
        before_bytes = self.resident_last_bytes - max(0.0, demanded - gone) * extent_bytes
        used_bytes = share * max(0.0, before_bytes) + (demanded + min(ahead, gone)) * extent_bytes
        return min(float(self.size_bytes), used_bytes)

    def _reloads_of(self, loads: float) -> float:
        """Return how many of these loads were reloads: as many as of all loads."""
        all_loads = self.demanded + self.prefetched
        return loads * min(1.0, self.reloads / all_loads) if all_loads else 0.0
