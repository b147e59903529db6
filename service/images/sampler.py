# SPDX-License-Identifier: Apache-2.0
"""Makes probes of resident extents, and keeps what they and the counters tell.

A probe takes an extent out of the guests' mappings into the standby list. At most eight or one in
200 of the resident extents are out at once, and no more than half of what the list holds. At most
12 probes begin in a second, since each costs a fifth of a millisecond of CPU time. Most tell how
often extents are used: an extent that was touched is probed again a tick later (at once, the same
access might fault again before its guest has run), until it was out for so long that one touch in
all is to be expected on average. The others stay out for a window: they tell how much is used at
all. An extent that nobody touched goes back into the frames without a read of the source, unless
its room was needed meanwhile. Images whose extents the list does not take are neither probed nor
counted. accounting/policy/use.py makes estimates of all this.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from cowshed.accounting import (
    MOST_TOUCHES,
    STAY_PARTS,
    WINDOWS_SECONDS,
    Counts,
    Exposure,
    ExtentKey,
    Observed,
    Probe,
    Seen,
    Use,
    estimate_use,
)
from cowshed.cache import ExtentState, Image, PageStore
from cowshed.service.images.evictor import Evictor
from cowshed.service.runtime.logs import EventLog

__all__ = ["Sampler"]

_log = EventLog("cowshed.sampler")

_TICK_SECONDS: Final = 0.25
_OUT_SHARE: Final = 200
_OUT_MIN: Final = 8
# Of fewer resident extents a single one would be too large a part: nothing is estimated then.
_RESIDENT_MIN: Final = 160
_BEGUN_PER_TICK: Final = 3
# One in this many of the probes that begin is for a window; at most half of those out are.
_LONG_SHARE: Final = 4
# An exposure lasts until one touch is to be expected, by the last so many, but within these bounds,
# and not longer than what counts.
_RECENT_EXPOSURES: Final = 64
_EXPOSURE_SECONDS_MIN: Final = 0.02
_EXPOSURE_SECONDS_MAX: Final = 1.0
# An extent may be held at the moment when it is to be probed again: it is tried so often.
_TRIES: Final = 8
# Steps of a walk in search of a resident extent; after so many without one, on the next occasion.
_WALK_STEPS: Final = 1 << 16
# A probe in a huge page of frames takes a millisecond or more: so much of a CPU's time for these.
_COSTLY_SHARE: Final = 0.002
# Strides of about the golden ratio spread evenly however many there are.
_GOLDEN: Final = (1 + math.sqrt(5)) / 2
# Estimates are made anew as often as this in their window, if somebody asks.
_MADE_ANEW: Final = 10


@dataclass
class _Exposing:
    """An exposure under way: how long it is to last, and what it has shown."""

    limit: float
    seconds: float = 0.0
    touches: list[float] = field(default_factory=list)
    nr_tries: int = 0


@dataclass
class _Out:
    """A probe that has begun; without an exposure it is for the windows."""

    image: Image
    began: float
    horizon: float
    exposing: _Exposing | None
    is_missed: bool = False


@dataclass
class _Record(Observed):
    """What is known of an image, and where the walk over its extents is."""

    walk_at: int = 0
    walk_stride: int = 0


class Sampler:
    """One thread, from start() to stop(). Without a standby list it makes no probes."""

    def __init__(
        self, store: PageStore, evictor: Evictor, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._evictor = evictor
        self._clock = clock
        self._rng = random.Random()
        self._out: dict[ExtentKey, _Out] = {}
        self._again: dict[ExtentKey, _Exposing] = {}  # touched, to be probed again
        self._rates: deque[float] = deque(maxlen=_RECENT_EXPOSURES)
        self._counted_at = -math.inf
        self._waiting: ExtentKey | None = None
        self._costly_from = -math.inf
        self._stay_seconds = math.inf
        self._records: dict[int, _Record] = {}
        self._made: dict[tuple[int, int], tuple[float, Use]] = {}  # by image and window; -1: all
        self._lock = threading.Lock()  # of _out, _records and _made
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop and join the thread; extents that are out stay in the standby list."""
        self._stopping.set()
        self._thread.join()

    def use(self, image: Image | None = None) -> list[Use]:
        """Estimate what guests used of an image, or of all (None), over each window.

        An estimate is made anew when it is older than a tenth of its window; O(probes).
        """
        now = self._clock()
        capacity = self._store.counters().capacity_extents if image is None else None
        scope = -1 if image is None else image.image_no
        found = []
        with self._lock:
            records = [r for no, r in self._records.items() if scope in (-1, no)]
            out = [
                Probe(now - each.began, touched=False)
                for (no, _), each in self._out.items()
                if each.exposing is None and scope in (-1, no)
            ]
            for window in WINDOWS_SECONDS:
                made_at, use = self._made.get((scope, window), (-math.inf, None))
                if use is None or now - made_at > window / _MADE_ANEW:
                    use = estimate_use(
                        records, out, window, now, self._store.extent_bytes, capacity
                    )
                    self._made[scope, window] = now, use
                found.append(use)
        return found

    def why_unknown(self) -> str:
        """Say why use() knows nothing, if it does not."""
        counters = self._store.counters()
        if not counters.standby_limit:
            return "standby is 0, so that nothing is measured"
        if not self._images():
            return "the standby list takes no extents of this size, so that nothing is measured"
        if self._resident_extents() < _RESIDENT_MIN:
            return f"less than {_RESIDENT_MIN} extents are resident, too few to measure"
        return "no guest used anything, or too little was measured yet"

    def tick(self) -> None:
        """Take what probes told, end those that are due, and begin new ones."""
        now = self._clock()
        counters = self._store.counters()
        with self._lock:
            self._count(now)
            self._take_ends(now)
            self._end_due(now)
        if counters.standby_limit:
            self._begin(self._resident_extents(), counters.standby_limit)

    def _run(self) -> None:
        while not self._stopping.wait(_TICK_SECONDS):
            try:
                self.tick()
            except Exception:
                _log.crash("sampler-failed", "trying again; a defect of cowshed: please report it")

    def _count(self, now: float) -> None:
        """Note the counters of all images, once a second."""
        if now - self._counted_at < 1:
            return
        self._counted_at = now
        images = self._images()
        seen = Seen()
        for image in images:
            of = image.counters()
            record = self._records.setdefault(image.image_no, _Record())
            record.size_bytes = image.size_bytes
            loads = of.demand_loads, of.prefetch_loads
            moves = of.soft_hits, of.reloads, of.standby_unmaps
            record.counts.append(Counts(now, *loads, *moves, image.resident_bytes))
            seen.add(record, now - WINDOWS_SECONDS[0])
        self._stay_seconds = seen.stay_seconds(seen.resident_bytes / self._store.extent_bytes)
        for gone in self._records.keys() - {image.image_no for image in images}:
            del self._records[gone]
            for window in WINDOWS_SECONDS:
                self._made.pop((gone, window), None)

    def _images(self) -> list[Image]:
        """Return the images that can be probed."""
        return [image for image in self._store if self._evictor.is_kept(image)]

    def _resident_extents(self) -> int:
        """Count what may be probed."""
        return sum(image.resident_bytes for image in self._images()) // self._store.extent_bytes

    def _take_ends(self, now: float) -> None:
        for end in self._store.take_sample_ends():
            key = end.image_no, end.extent
            out = self._out.pop(key, None)
            if out is None:
                continue
            seconds = end.ended_at - end.unmapped_at
            exposing = out.exposing
            if exposing is None:
                self._note_long(key, now, Probe(seconds, end.touched))
                continue
            exposing.seconds += seconds
            if end.touched and exposing.seconds <= exposing.limit:
                exposing.touches.append(exposing.seconds)
            is_over = exposing.seconds >= exposing.limit or len(exposing.touches) == MOST_TOUCHES
            if is_over or not end.touched:
                self._note_exposure(key, now, exposing)
            else:
                self._again[key] = exposing

    def _end_due(self, now: float) -> None:
        for key, out in list(self._out.items()):
            if now - out.began < out.horizon:
                continue
            is_open = self._store.image(key[0]) is out.image
            if is_open and out.image.restore(key[1]):
                if out.exposing is None:
                    self._note_long(key, now, Probe(now - out.began, touched=False))
                else:
                    out.exposing.seconds = out.exposing.limit
                    self._note_exposure(key, now, out.exposing)
            elif is_open and not out.is_missed:
                # Touched or dropped a moment ago, which the next look shows; or evicted on request.
                out.is_missed = True
                continue
            del self._out[key]

    def _note_long(self, key: ExtentKey, now: float, probe: Probe) -> None:
        if record := self._records.get(key[0]):
            record.probes.append((now, probe))

    def _note_exposure(self, key: ExtentKey, now: float, exposing: _Exposing) -> None:
        if record := self._records.get(key[0]):
            seconds = min(exposing.seconds, exposing.limit)
            exposure = Exposure(key, seconds, tuple(exposing.touches))
            record.exposures.append((now, exposure))
            self._rates.append(exposure.rate()[0])

    def _begin(self, resident_extents: int, standby_limit: int) -> None:
        again, self._again = self._again, {}
        if resident_extents < _RESIDENT_MIN:
            return
        most = min(max(_OUT_MIN, resident_extents // _OUT_SHARE), standby_limit // 2)
        room = max(0, min(most - len(self._out), _BEGUN_PER_TICK))
        nr_again = min(room, len(again))
        self._begin_again(again, nr_again)
        picked = self._pick_some(room - nr_again)
        limit = self._exposure_seconds()
        begun = self._evictor.sample(key for key in picked if key not in self._again)
        with self._lock:
            nr_long = sum(out.exposing is None for out in self._out.values())
            for image, extent in begun:
                is_long = nr_long < most // 2 and not self._rng.randrange(_LONG_SHARE)
                nr_long += is_long
                horizon = float(self._rng.choice(WINDOWS_SECONDS)) if is_long else limit
                exposing = None if is_long else _Exposing(limit)
                out = _Out(image, self._clock(), horizon, exposing)
                self._out[image.image_no, extent] = out

    def _pick_some(self, nr: int) -> Iterator[ExtentKey]:
        """Pick up to nr extents, each to be unmapped before the next is asked for.

        One in a huge page costs a millisecond or more, so that the next of these must wait its
        time; and all others wait behind it, or too few of the probes would be of open regions.
        """
        for _ in range(nr):
            key = self._waiting if self._waiting is not None else self._pick()
            self._waiting = None
            if key is None:
                return
            is_costly = self._evictor.is_costly(key)
            if is_costly and self._clock() < self._costly_from:
                self._waiting = key
                return
            began = time.thread_time()
            yield key
            if is_costly:
                cost = time.thread_time() - began
                self._costly_from = self._clock() + cost / _COSTLY_SHARE

    def _pick(self) -> ExtentKey | None:
        """Pick a resident extent at random.

        An image by how much of it is resident; of the image the next on a walk in strides, which
        comes to each extent once in a round, so that none is picked more often by chance.
        """
        images = self._images()
        resident = [image.resident_bytes for image in images]
        if not any(resident):
            return None
        (image,) = self._rng.choices(images, resident)
        record = self._records.get(image.image_no)
        if record is None:
            return None  # it has just come
        nr = image.nr_extents
        if not record.walk_stride:
            record.walk_stride = next(
                stride for stride in range(round(nr / _GOLDEN), 0, -1) if math.gcd(stride, nr) == 1
            )
            record.walk_at = self._rng.randrange(nr)
        extent, record.walk_at = image.walk_resident(
            record.walk_at, record.walk_stride, _WALK_STEPS
        )
        return None if extent is None else (image.image_no, extent)

    def _begin_again(self, again: dict[ExtentKey, _Exposing], nr: int) -> None:
        """Go on with the first nr exposures of extents that were touched; keep the others."""
        keys = list(again)[:nr]
        begun = self._evictor.sample(keys)
        now = self._clock()
        with self._lock:
            for image, extent in begun:
                exposing = again.pop((image.image_no, extent))
                horizon = exposing.limit - exposing.seconds
                self._out[image.image_no, extent] = _Out(image, now, horizon, exposing)
            for key in keys:
                if refused := again.get(key):
                    self._note_refused(key, now, refused)
                    if refused.nr_tries == _TRIES:
                        del again[key]
        self._again = again

    def _note_refused(self, key: ExtentKey, now: float, exposing: _Exposing) -> None:
        image = self._store.image(key[0])
        if image is not None and image.states(key[1], 1)[0] == ExtentState.RESIDENT:
            exposing.nr_tries += 1  # held or pinned
            return
        exposing.nr_tries = _TRIES
        exposing.seconds = exposing.limit  # no longer resident: it would not have been touched
        self._note_exposure(key, now, exposing)

    def _exposure_seconds(self) -> float:
        """Return how long an extent must be out for one touch, on average over all."""
        rate = math.fsum(self._rates) / max(1, len(self._rates))
        most = min(_EXPOSURE_SECONDS_MAX, self._stay_seconds / STAY_PARTS)
        return max(_EXPOSURE_SECONDS_MIN, min(most, 1 / rate if rate else math.inf))
