# SPDX-License-Identifier: Apache-2.0
"""The policy beside LRU on access sequences, counting loads.

The real sequence: the machine's Python library laid out as an image, in the order of a directory
walk, each file from a page boundary on. Real interpreters start programs from it, and an audit hook
reports each file they open, in order; we take each file as read from beginning to end, once. So the
files and their order are recorded, the extents within a file and the mixture of programs (seeded)
are ours. One start of a program is one guest; the last four guests hold their grants, as in a pool
of sandboxes. A scan reads the whole image in order, as tar does.

LRU is told of every access. The policy is told what the ledger knows: each guest's first fault on
an extent since it was loaded.
"""

import os
import random
import subprocess
import sys
import sysconfig
from collections import OrderedDict
from dataclasses import dataclass

import pytest

from cowshed.accounting.policy.eviction import PATIENCE, EvictionPolicy, ExtentKey

pytestmark = pytest.mark.slow

Access = tuple[int, int]  # guest, extent_no

EXTENT_BYTES = 16384  # a quarter of the usual, so that the library is a cacheful of them
PROGRAMS = (
    "json.tool",
    "unittest",
    "http.server",
    "asyncio",
    "email.mime.text",
    "pydoc",
    "tarfile",
)
RECORDER = """
import sys
opened = []
sys.addaudithook(lambda event, args: event == "open" and opened.append(args[0]))
import {program}
print(*(path for path in opened if isinstance(path, str)), sep="\\n")
"""


class PolicyCache:
    """A store and ledger in miniature around the policy: loads on a fault, evicts when full."""

    def __init__(self, capacity_extents: int, nr_live_guests: int = 4) -> None:
        self.policy = EvictionPolicy(capacity_extents)
        self.capacity_extents = capacity_extents
        self.nr_live_guests = nr_live_guests
        self.live_guests: list[int] = []
        self.grants: dict[ExtentKey, set[int]] = {}
        self.touches: dict[ExtentKey, int] = {}

    def take_touches(self, key: ExtentKey) -> int:
        return min(3, self.touches.pop(key, 0))

    def refs(self, key: ExtentKey) -> int:
        return len(self.grants[key])

    def evictable(self, key: ExtentKey) -> bool:
        return True

    def access(self, guest: int, extent_no: int) -> bool:
        """Answer an access; return whether it had to load."""
        if guest not in self.live_guests:
            self.live_guests.append(guest)
            for gone in self.live_guests[: -self.nr_live_guests]:
                for guests in self.grants.values():
                    guests.discard(gone)
            del self.live_guests[: -self.nr_live_guests]
        key = (0, extent_no)
        must_load = key not in self.grants
        if must_load:
            if len(self.policy) == self.capacity_extents:
                victims = self.policy.choose_victims(1, self)
                self.policy.forget(victims, evicted=True)
                for victim in victims:
                    del self.grants[victim]
                    self.touches.pop(victim, None)
            self.policy.admit([key])
            self.grants[key] = set()
        if guest not in self.grants[key]:
            self.grants[key].add(guest)
            self.touches[key] = self.touches.get(key, 0) + 1
        return must_load


class LruCache:
    """The least recently used goes."""

    def __init__(self, capacity_extents: int) -> None:
        self.capacity_extents = capacity_extents
        self.resident: OrderedDict[int, None] = OrderedDict()

    def access(self, guest: int, extent_no: int) -> bool:
        """Answer an access; return whether it had to load."""
        must_load = extent_no not in self.resident
        self.resident[extent_no] = None
        self.resident.move_to_end(extent_no)
        if len(self.resident) > self.capacity_extents:
            self.resident.popitem(last=False)
        return must_load


def loads(cache: PolicyCache | LruCache, accesses: list[Access], scanners: set[int]) -> int:
    """Count the loads that guests other than the scanners waited for."""
    loaded = [guest for guest, extent_no in accesses if cache.access(guest, extent_no)]
    return sum(guest not in scanners for guest in loaded)


@dataclass(frozen=True)
class Recording:
    """What programs read of the library image, each extent at its first touch."""

    image: list[int]
    programs: list[list[int]]

    @property
    def nr_used(self) -> int:
        return len({extent for program in self.programs for extent in program})

    def runs(self, nr_runs: int, scan_every: int, seed: int) -> tuple[list[Access], set[int]]:
        """Mix runs, the first programs more often; return the accesses and the scanning guests."""
        rng = random.Random(seed)
        weights = [1 / (rank + 1) for rank in range(len(self.programs))]
        scanners = set(range(scan_every - 1, nr_runs, scan_every)) if scan_every else set[int]()
        accesses: list[Access] = []
        for guest in range(nr_runs):
            program = rng.choices(self.programs, weights)[0]
            accesses += [(guest, e) for e in (self.image if guest in scanners else program)]
        return accesses, scanners


def size_bytes(path: str) -> int:
    """0 for what is gone, as what a compiler has written for a moment."""
    try:
        return os.path.getsize(path)
    except FileNotFoundError:
        return 0


@pytest.fixture(scope="module")
def recording() -> Recording:
    layout: dict[str, range] = {}
    offset_bytes = 0
    for folder, folders, files in os.walk(sysconfig.get_paths()["stdlib"]):
        folders[:] = sorted(set(folders) - {"site-packages", "dist-packages", "test"})
        for path in (os.path.join(folder, file) for file in sorted(files)):
            length = max(1, size_bytes(path))
            end_bytes = offset_bytes + length
            layout[path] = range(offset_bytes // EXTENT_BYTES, -(-end_bytes // EXTENT_BYTES))
            offset_bytes = -(-end_bytes // 4096) * 4096
    programs = []
    for program in PROGRAMS:
        command = [sys.executable, "-I", "-S", "-c", RECORDER.format(program=program)]
        opened = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        paths = [path for path in opened.splitlines() if path in layout]
        programs.append(list(dict.fromkeys(e for path in paths for e in layout[path])))
        assert len(programs[-1]) >= 10, f"{program} read next to nothing of the library: {paths}"
    return Recording(list(dict.fromkeys(e for r in layout.values() for e in r)), programs)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75, 0.9, 1.1])
def test_program_starts_cost_no_more_loads_than_with_lru(
    recording: Recording, share: float
) -> None:
    capacity = int(recording.nr_used * share)
    ours = theirs = 0
    for seed in range(4):
        accesses, _ = recording.runs(60, 0, seed)
        ours += loads(PolicyCache(capacity), accesses, set())
        theirs += loads(LruCache(capacity), accesses, set())
    print(f"capacity {capacity}: {ours} loads, LRU {theirs}")
    assert ours <= theirs * 1.1


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 1.1])
def test_scans_between_program_starts_cost_them_fewer_loads_than_with_lru(
    recording: Recording, share: float
) -> None:
    capacity = int(recording.nr_used * share)
    accesses, scanners = recording.runs(40, 8, seed=1)
    ours = loads(PolicyCache(capacity), accesses, scanners)
    theirs = loads(LruCache(capacity), accesses, scanners)
    print(f"capacity {capacity}: {ours} loads, LRU {theirs}")
    assert ours <= theirs * 0.9


def test_a_hot_loop_survives_scans_that_flush_lru() -> None:
    hot, nr_rounds = range(50), 40
    accesses: list[Access] = []
    for guest in range(nr_rounds):
        accesses += [(guest, extent) for extent in hot]
        accesses += [(-1, 1000 + 130 * guest + nr) for nr in range(130)]
    assert loads(LruCache(100), accesses, {-1}) == 50 * nr_rounds
    assert loads(PolicyCache(100), accesses, {-1}) <= 50 * 3


def test_extents_shared_by_many_guests_survive_one_guests_churn() -> None:
    shared = range(80)
    accesses = [(guest, extent) for guest in range(10) for extent in shared]
    accesses += [(10, 1000 + nr) for nr in range(500)]
    again = [(11, extent) for extent in shared]
    ours, theirs = PolicyCache(100, nr_live_guests=20), LruCache(100)
    for cache in (ours, theirs):
        loads(cache, accesses, set())
    assert loads(theirs, again, set()) == 80
    # the first victims were asked for one by one, when only hot ones were at hand
    assert loads(ours, again, set()) <= 80 // PATIENCE
