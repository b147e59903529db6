# SPDX-License-Identifier: Apache-2.0
"""Which regions are worth opening, and in which order they are closed again.

A fault thread names a region after a few faults in it, or after the first if its frames are one
huge page already. Making them one costs a millisecond, and each guest with the region mapped faults
there again; so that is done once two guests have named it, or one has twice. Opening a region whose
frames are one huge page pays at once.

Open regions cause no faults, so that nothing tells whether they are used. They are closed in the
order in which they were opened: one now and then, to learn that, and more when room is short, as
many as are their share of what is resident. A region that is used is named at once and opened
again, as the last. Closing what operators have pinned gives no room: such regions are kept.

Sans I/O: told what happened, with the time in seconds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Set
from itertools import islice
from typing import Final

__all__ = ["OpeningPolicy", "RegionKey"]

RegionKey = tuple[int, int]
"""image_no and region number."""

_NAMED_MAX: Final = 1 << 16
_AGAIN_SECONDS: Final = 60.0
_BUSY_SECONDS: Final = 1.0  # doubled each time
_BUSY_MOST_SECONDS: Final = 8.0
_SAMPLE_AFTER_SECONDS: Final = 10.0
_TIMES: Final = 2


class OpeningPolicy:
    """Remembers who named which region, and the order of those that are open.

    Invariant: _open has each open region once, the one opened longest ago first.
    """

    def __init__(self) -> None:
        self._named: OrderedDict[RegionKey, set[int]] = OrderedDict()
        self._named_twice: set[RegionKey] = set()
        self._refused: OrderedDict[RegionKey, tuple[float, float]] = OrderedDict()
        self._open: OrderedDict[RegionKey, float] = OrderedDict()
        self._owed = 0.0

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, key: RegionKey) -> bool:
        return key in self._open

    def name(self, key: RegionKey, account_no: int, now: float, *, is_collapsed: bool) -> set[int]:
        """Note that an account's guest would use the region; return the accounts to open it for.

        Empty: not yet. O(1).
        """
        if self.is_refused(key, now):
            return set()
        named = self._named.setdefault(key, set())
        if account_no in named:
            self._named_twice.add(key)
        named.add(account_no)
        self._named.move_to_end(key)
        while len(self._named) > _NAMED_MAX:
            old, _ = self._named.popitem(last=False)
            self._named_twice.discard(old)
        if is_collapsed or len(named) >= _TIMES or key in self._named_twice:
            del self._named[key]
            self._named_twice.discard(key)
            return named
        return set()

    def is_refused(self, key: RegionKey, now: float) -> bool:
        """Return whether it is too early to try the region again after note_refused()."""
        return now < self._refused.get(key, (now, 0.0))[0]

    def note_opened(self, key: RegionKey, now: float) -> None:
        """A region was opened for a guest; its turn to be closed comes last."""
        self._open[key] = now
        self._open.move_to_end(key)
        self._refused.pop(key, None)

    def note_closed(self, key: RegionKey) -> None:
        """A region is open for no guest any more."""
        self._open.pop(key, None)

    def note_refused(self, key: RegionKey, now: float, *, is_busy: bool = False) -> None:
        """A region could not be made one huge page, or be opened: try again in a minute.

        is_busy: a frame was in use at the moment; try again in a second, then in two, four, eight.
        An attempt unmaps frames, which guests then fault in again.
        """
        seconds = _AGAIN_SECONDS
        if is_busy:
            last = self._refused.get(key, (now, 0.0))[1]
            seconds = min(max(2 * last, _BUSY_SECONDS), _BUSY_MOST_SECONDS)
        self._refused[key] = now + seconds, seconds
        self._refused.move_to_end(key)
        while len(self._refused) > _NAMED_MAX:
            self._refused.popitem(last=False)

    def choose_sample(self, now: float) -> RegionKey | None:
        """Name the region to close in order to learn whether it is used; None if none is due."""
        for key, opened in self._open.items():
            return key if now - opened >= _SAMPLE_AFTER_SECONDS else None
        return None

    def choose_for_room(
        self, nr_wanted: int, nr_open: int, nr_resident: int, kept: Set[RegionKey] = frozenset()
    ) -> list[RegionKey]:
        """Name the regions to close when nr_wanted extents are to be evicted, none of those kept.

        nr_open of the nr_resident extents lie in open regions: as many of those wanted come from
        them, on average over several calls.
        """
        nr_regions = self._nr_closable(kept)
        if not nr_regions or not nr_open:
            self._owed = 0.0
            return []
        self._owed += nr_wanted * nr_regions / max(nr_open, nr_resident)
        nr = min(nr_regions, int(self._owed))
        self._owed -= nr
        return self._oldest(nr, kept)

    def choose_all_for(
        self, nr_wanted: int, nr_open: int, kept: Set[RegionKey] = frozenset()
    ) -> list[RegionKey]:
        """Name the regions to close when nothing else can be evicted, none of those kept."""
        per_region = max(1.0, nr_open / len(self._open)) if self._open else 1.0
        return self._oldest(int(-(-nr_wanted // per_region)), kept)

    def _nr_closable(self, kept: Set[RegionKey]) -> int:
        return len(self._open) - sum(key in self._open for key in kept)

    def _oldest(self, nr: int, kept: Set[RegionKey]) -> list[RegionKey]:
        return list(islice((key for key in self._open if key not in kept), nr))
