# SPDX-License-Identifier: Apache-2.0
"""Sequences of accesses to extents, drawn by chance: they depend on a seed only."""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Final

__all__ = ["hot_set_and_scan", "interleave", "zipf", "zipf_with_scans"]

_ALPHA: Final = 0.9
_NR_ZIPF: Final = 1024
_NR_READS: Final = 60_000


def zipf(_: Path, rng: random.Random) -> list[int]:
    """Draw reads of 1,024 extents in random order, the k-th most popular k^-0.9 times as often."""
    extents = list(range(_NR_ZIPF))
    rng.shuffle(extents)
    sums = list(itertools.accumulate((rank + 1) ** -_ALPHA for rank in range(_NR_ZIPF)))
    draws = (bisect.bisect(sums, rng.random() * sums[-1]) for _ in range(_NR_READS))
    return [extents[rank] for rank in draws]


def zipf_with_scans(folder: Path, rng: random.Random) -> list[int]:
    """The same with four reads of the whole image, in order, in between."""
    reads = zipf(folder, rng)
    step = len(reads) // 5
    parts = [reads[at : at + step] for at in range(0, len(reads), step)]
    scan = list(range(_NR_ZIPF))
    return [extent for part in parts[:-1] for extent in [*part, *scan]] + parts[-1]


def hot_set_and_scan(_: Path, rng: random.Random) -> list[int]:
    """Draw two reads of a hot set of 400 extents for each of a scan of 8,000 in random order."""
    scan = list(range(400, 8400))
    rng.shuffle(scan)
    return [extent for one in scan for extent in (rng.randrange(400), rng.randrange(400), one)]


def interleave(guests: list[list[int]], rng: random.Random, stagger: int = 0) -> Iterator[int]:
    """Merge guests' accesses: each next one is of a guest drawn by chance among those that began.

    A guest begins stagger accesses after the one before; all at once if that is 0.
    """
    waiting = [iter(guest) for guest in guests]
    running: list[Iterator[int]] = []
    nr = 0
    while waiting or running:
        while waiting and (not running or nr >= stagger * (len(guests) - len(waiting))):
            running.append(waiting.pop(0))
        guest = rng.choice(running)
        extent = next(guest, None)
        if extent is None:
            running.remove(guest)
        else:
            nr += 1
            yield extent
