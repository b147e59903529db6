# SPDX-License-Identifier: Apache-2.0
"""Replays sequences of accesses through eviction policies, and counts the misses of each.

An access is the number of an extent. FIFO, LRU and S3-FIFO are told of every access, and so is
Belady's MIN, which knows the future: no policy has fewer misses. Ours is told what the store tells
it: loads, soft hits and drops. Its store is a model of ours without time: it keeps
`STANDBY_PERCENT` of the capacity in the standby list and unmaps as the evictor does.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Final

from cowshed.accounting import EvictionPolicy, ExtentKey

__all__ = ["POLICIES", "STANDBY_PERCENT"]

STANDBY_PERCENT: Final = 20
# As in service/images/evictor.py and cache/core/store.c.
_LOW_SHARE: Final = 16
_UNMAPS_PER_LOAD: Final = 8
_UNMAPS_MIN: Final = 64
_BATCH_SHARE: Final = 128
_BATCH_MAX: Final = 16

Accesses = Sequence[int]


def fifo(accesses: Accesses, capacity: int) -> int:
    """Count the misses if the extent that was loaded first goes."""
    resident: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for extent in accesses:
        if extent not in resident:
            misses += 1
            resident[extent] = None
            if len(resident) > capacity:
                resident.popitem(last=False)
    return misses


def lru(accesses: Accesses, capacity: int) -> int:
    """Count the misses if the extent that was used longest ago goes."""
    resident: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for extent in accesses:
        if extent in resident:
            resident.move_to_end(extent)
            continue
        misses += 1
        resident[extent] = None
        if len(resident) > capacity:
            resident.popitem(last=False)
    return misses


def s3_fifo(accesses: Accesses, capacity: int) -> int:
    """Count the misses of S3-FIFO (Yang et al., SOSP 2023) with a count at every access."""
    nr_small = max(1, capacity // 10)
    small: deque[int] = deque()
    main: deque[int] = deque()
    uses: dict[int, int] = {}  # of the resident
    ghosts: OrderedDict[int, None] = OrderedDict()
    misses = 0

    def evict_small() -> bool:
        while small:
            extent = small.popleft()
            if uses[extent] > 1:
                uses[extent] = 0
                main.append(extent)
                if len(main) > capacity - nr_small:
                    evict_main()
                continue
            del uses[extent]
            ghosts[extent] = None
            if len(ghosts) > capacity - nr_small:
                ghosts.popitem(last=False)
            return True
        return False

    def evict_main() -> None:
        while True:
            extent = main.popleft()
            if uses[extent] == 0:
                del uses[extent]
                return
            uses[extent] -= 1
            main.append(extent)

    for extent in accesses:
        if extent in uses:
            uses[extent] = min(3, uses[extent] + 1)
            continue
        misses += 1
        while len(uses) >= capacity:
            if len(small) < nr_small or not evict_small():
                evict_main()
        uses[extent] = 0
        if extent in ghosts:
            del ghosts[extent]
            main.append(extent)
        else:
            small.append(extent)
    return misses


def belady(accesses: Accesses, capacity: int) -> int:
    """Count the misses of MIN: the extent whose next use is the farthest goes."""
    never = len(accesses)
    next_use = [never] * never
    last: dict[int, int] = {}
    for at in range(never - 1, -1, -1):
        next_use[at] = last.get(accesses[at], never)
        last[accesses[at]] = at
    resident: dict[int, int] = {}
    farthest: list[tuple[int, int]] = []
    misses = 0
    for at, extent in enumerate(accesses):
        if extent not in resident:
            misses += 1
            while len(resident) >= capacity:
                use, victim = heapq.heappop(farthest)
                if resident.get(victim) == -use:
                    del resident[victim]
        resident[extent] = next_use[at]
        heapq.heappush(farthest, (-next_use[at], extent))
    return misses


class _Silent:
    """What the ledger tells the policy if there is a standby list: nothing that it uses."""

    def take_touches(self, _: ExtentKey, /) -> int:
        """Count no faults."""
        return 0

    def refs(self, _: ExtentKey, /) -> int:
        """Count one guest."""
        return 1

    def evictable(self, _: ExtentKey, /) -> bool:
        """Let any extent go."""
        return True


def ours(accesses: Accesses, capacity: int, standby_percent: int = STANDBY_PERCENT) -> int:
    """Count the misses of cowshed's policy with a standby list of that part of the capacity."""
    target = max(1, capacity * standby_percent // 100)
    room = capacity - max(1, min(_BATCH_MAX, capacity // _BATCH_SHARE))
    low = target - max(1, target // _LOW_SHARE)
    policy, heat = EvictionPolicy(capacity, target), _Silent()
    frames: set[int] = set()
    standby: OrderedDict[int, int] = OrderedDict()  # extents, with their numbers in order
    numbers = count()
    unmapped = next(numbers)
    misses = loads = 0
    for extent in accesses:
        if extent in frames:
            continue
        if extent in standby:
            age = min(1.0, (unmapped - standby.pop(extent)) / target)
            policy.touch((0, extent), age)
            frames.add(extent)
            continue
        misses += 1
        loads += 1
        if len(frames) + len(standby) >= room:
            if standby:
                policy.drop((0, standby.popitem(last=False)[0]))
            else:
                gone = policy.choose_victims(1, heat)
                policy.forget(gone, evicted=True)
                frames.difference_update(key[1] for key in gone)
        frames.add(extent)
        policy.admit([(0, extent)])
        if room - len(frames) < low:
            wanted = min(target - (room - len(frames)), max(_UNMAPS_MIN, _UNMAPS_PER_LOAD * loads))
            loads = 0
            victims = policy.choose_victims(wanted, heat)
            policy.unmap(victims)
            for _, victim in victims:
                frames.remove(victim)
                unmapped = next(numbers)
                standby[victim] = unmapped
    return misses


POLICIES: Final[dict[str, Callable[[Accesses, int], int]]] = {
    "cowshed": ours,
    "with a list of 2 %": partial(ours, standby_percent=2),
    "FIFO": fifo,
    "LRU": lru,
    "S3-FIFO, all accesses": s3_fifo,
    "Belady": belady,
}
"""By name: a function of the accesses and the capacity in extents, which counts the misses."""
