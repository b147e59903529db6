# SPDX-License-Identifier: Apache-2.0
"""The operators of a round: they evict, pin, warm, audit, change quotas, and make trouble."""

from __future__ import annotations

import errno
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from backend_process import BackendProcess, StressError
from rounds import KIB, Round

from cowshed.cache import CapacityError, UsageError
from cowshed.transport import Backend

# Everywhere a thread of the core may be held up for a moment.
_STOPS = (
    "LOAD_READ",
    "LOAD_FILL",
    "LOAD_PUBLISH",
    "LOAD_ANSWER",
    "EVICT_PUNCH",
    "EVICT_REVOKE",
    "FAULT_READ",
    "FAULT_HELD",
    "WRITE_CHARGED",
    "SETTLE_PROTECTED",
    "COLLAPSE",
    "OPEN_CHARGED",
    "OPEN_BARE",
    "OPEN_DONE",
    "CLOSE_GUARDED",
    "CLOSE_PROTECTED",
)
# How sources and frames fail: the point, errno, and how many times most.
_ERRORS = (
    ("LOAD_READ", errno.EIO, 1),
    ("LOAD_READ", errno.EIO, 3),
    ("LOAD_READ", errno.EIO, 20),
    ("LOAD_READ", errno.ENODATA, 4),
    ("LOAD_FILL", errno.ENOSPC, 4),
    ("LOAD_PUBLISH", errno.EIO, 2),
)

_REGION_BYTES = 2048 * KIB

# How long a guest whose quota was raised may take to notice, on a busy machine.
_GOES_ON_SECONDS = 60.0


class Operator(threading.Thread):
    """Does one kind of thing at random until told to end; pauses between two of them on demand."""

    def __init__(self, name: str, act: Callable[[], None], pause_seconds: float) -> None:
        super().__init__(name=name, daemon=True)
        self._act = act
        self._pause_seconds = pause_seconds
        self._ended = threading.Event()
        self._gate = threading.Lock()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self._ended.wait(self._pause_seconds):
                with self._gate:
                    self._act()
        except BaseException as error:
            self.error = error

    def pause(self, patience: float) -> None:
        """Return once it is between two acts; it stays there until resume()."""
        if not self._gate.acquire(timeout=patience):
            raise StressError(f"operator {self.name!r} does not come to an end of its request")

    def resume(self) -> None:
        self._gate.release()

    def end(self) -> None:
        self._ended.set()


class Commands:
    """Requests of the product's own, on a connection of its own."""

    def __init__(self, of: Round, backend: BackendProcess, rng: random.Random) -> None:
        self._round = of
        self._rng = rng
        self._backend: Backend = backend.connect()
        self.pins: dict[str, defaultdict[int, int]] = {name: defaultdict(int) for name in of.sizes}
        self._pinned_ranges: list[tuple[str, int, int]] = []
        self.nr_requests: defaultdict[str, int] = defaultdict(int)

    def act(self) -> None:
        """One request at random."""
        kinds = ("evict", "evict", "evict", "warm", "pin", "unpin", "region", "audit")
        kind = self._rng.choice(kinds)
        self.nr_requests[kind] += 1
        getattr(self, f"_{kind}")()

    def _some_range(self) -> tuple[str, int, int]:
        image = self._rng.choice(list(self._round.sizes))
        size = self._round.sizes[image]
        offset = self._rng.randrange(size)
        most = self._rng.choice((1, self._round.extent_bytes, size))
        return image, offset, self._rng.randint(1, min(most, size - offset))

    def _evict(self) -> None:
        image, offset, length = self._some_range()
        if self._rng.random() < 0.2:
            self._backend.request("evict", image=image)
        else:
            self._backend.request("evict", image=image, offset=offset, length=length)

    def _warm(self) -> None:
        image, offset, length = self._some_range()
        self._backend.request("warm", image=image, offset=offset, length=length)

    def _pin(self) -> None:
        self._pin_range(*self._some_range())

    def _pin_range(self, image: str, offset: int, length: int) -> None:
        try:
            self._backend.request("pin", image=image, offset=offset, length=length)
        except CapacityError:
            return
        self._pinned_ranges.append((image, offset, length))
        self._count_pins(image, offset, length, 1)

    def _region(self) -> None:
        """Pin a whole region, so that it is opened for every guest with room in its quota."""
        nr_regions = self._round.sizes["large"] // _REGION_BYTES
        if nr_regions:
            offset = self._rng.randrange(nr_regions) * _REGION_BYTES
            self._pin_range("large", offset, _REGION_BYTES)

    def _unpin(self) -> None:
        if self._pinned_ranges:
            at = self._rng.randrange(len(self._pinned_ranges))
            image, offset, length = self._pinned_ranges.pop(at)
            self._backend.request("unpin", image=image, offset=offset, length=length)
            self._count_pins(image, offset, length, -1)
        else:
            self._refuse_unpin()

    def _refuse_unpin(self) -> None:
        image, offset, length = self._some_range()
        try:
            self._backend.request("unpin", image=image, offset=offset, length=length)
        except UsageError:
            return
        raise StressError(f"unpinned {length} bytes at {offset} of {image}, which nobody pinned")

    def _count_pins(self, image: str, offset: int, length: int, step: int) -> None:
        extent_bytes = self._round.extent_of(image)
        of_image = self.pins[image]
        for extent in range(offset // extent_bytes, (offset + length - 1) // extent_bytes + 1):
            of_image[extent] += step
            if not of_image[extent]:
                del of_image[extent]

    def _audit(self) -> None:
        mismatches = self._backend.request("audit")["mismatches"]
        broken = self._backend.request("check")["broken"]
        if mismatches or broken:
            raise StressError(f"while guests run: audit {mismatches[:5]}, broken {broken}")

    def unpin_all(self) -> None:
        for image, offset, length in self._pinned_ranges:
            self._backend.request("unpin", image=image, offset=offset, length=length)
            self._count_pins(image, offset, length, -1)
        self._pinned_ranges.clear()

    def repair_all(self) -> None:
        """Load everything once more, a part at a time."""
        for image, size in self._round.sizes.items():
            extent_bytes = self._round.extent_of(image)
            step = max(1, self._round.capacity_bytes // 2 // extent_bytes) * extent_bytes
            for offset in range(0, size, step):
                part = {"image": image, "offset": offset, "length": min(step, size - offset)}
                self._backend.request("evict", **part)
                self._backend.request("warm", **part)

    def close(self) -> None:
        self._backend.close()


def _has_room(guest: dict[str, Any]) -> bool:
    """Whether the quota of a guest, as status has it, has room for more than any window."""
    return bool(guest["private_bytes"] < guest["quota_bytes"] - 512 * KIB)


class Quotas:
    """Watches guests come to a stop at their quota, raises it, and holds every guest to it."""

    def __init__(self, backend: BackendProcess, rng: random.Random) -> None:
        self._rng = rng
        self._backend: Backend = backend.connect()
        self._most: dict[str, int] = {}
        self.nr_stops = 0
        self.always_raise = False

    def act(self) -> None:
        """Look at all guests; raise some stopped ones' quota, change some others'."""
        for guest in self._backend.request("status")["status"]["guests"]:
            name, quota = guest["name"], guest["quota_bytes"]
            if quota is None or guest["policy"] == "allow":
                continue
            most = self._most[name] = max(self._most.get(name, 0), quota)
            if guest["private_bytes"] > most:
                raise StressError(f"guest {name} has more than its quota ever was, {most}: {guest}")
            if guest["state"] == "stopped-quota":
                self.nr_stops += 1
                if _has_room(guest):
                    self._wait_goes_on(name)
                if self.always_raise or self._rng.random() < 0.5:
                    self._set(name, quota + self._rng.randint(1, 128) * 4 * KIB)
            elif self._rng.random() < 0.05 and not self.always_raise:
                self._set(name, max(4 * KIB, quota + self._rng.randint(-32, 32) * 4 * KIB))

    def _wait_goes_on(self, name: str) -> None:
        """Wait until a guest with room is not stopped: raised a moment ago, it may not have run."""
        deadline = time.monotonic() + _GOES_ON_SECONDS
        while True:
            guests = self._backend.request("status")["status"]["guests"]
            held = [g for g in guests if g["name"] == name and g["state"] == "stopped-quota"]
            if not any(map(_has_room, held)):
                return
            if time.monotonic() > deadline:
                raise StressError(f"guest {name} stays stopped below its quota: {held}")
            time.sleep(0.01)

    def stopped(self) -> set[str]:
        """Names of the processes whose guest is stopped at this moment."""
        guests = self._backend.request("status")["status"]["guests"]
        return {
            guest["name"].partition(".")[0] for guest in guests if guest["state"] == "stopped-quota"
        }

    def _set(self, name: str, quota_bytes: int) -> None:
        self._most[name] = max(self._most[name], quota_bytes)
        try:
            self._backend.request("quota", guest=name, quota_bytes=quota_bytes)
        except UsageError as error:
            if "no guest" not in str(error):  # it may have left meanwhile
                raise

    def close(self) -> None:
        self._backend.close()


class Trouble:
    """Holds threads of the core up at its named points, and makes sources fail."""

    def __init__(self, of: Round, backend: BackendProcess, rng: random.Random) -> None:
        self._round = of
        self._backend = backend
        self._rng = rng

    def act(self) -> None:
        if self._round.errors and self._rng.random() < 0.4:
            point, number, most = self._rng.choice(_ERRORS)
            nr_times = self._rng.randint(1, most)
            self._backend.order("arm", point=point, action="FAIL", arg=number, nr_times=nr_times)
            time.sleep(self._rng.random() * 0.1)
        else:
            point = self._rng.choice(_STOPS)
            nr_times = self._rng.randint(1, 2)
            self._backend.order("arm", point=point, action="STOP", arg=0, nr_times=nr_times)
            time.sleep(self._rng.random() * 0.015)
        self._backend.order("release", point=point)
