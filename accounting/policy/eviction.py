# SPDX-License-Identifier: Apache-2.0
"""Which extents to evict: S3-FIFO, with sharing taken into account.

Theory of operation. After Yang et al., "FIFO queues are all you need for cache eviction" (SOSP
2023). New extents wait in a *small* queue, a tenth of the capacity. An extent that leaves it
without heat is evicted and only its name is kept, in the *ghosts*; an extent that was wanted while
it waited moves to *main*. An extent that is loaded again while its name is a ghost was evicted too
early and goes straight to main. A scan of a whole image therefore washes through the small queue
and leaves main alone.

We see faults, not reads: once a guest has mapped an extent, its hits are silent. So heat is what
the ledger counts, *touches* (faults since we last looked, of which the one that loaded the extent
may be one) and *refs* (guests that were granted it: evicting it costs each of them a fault). Both
become *credit*:

    in small    touches + shared(refs) >= 2 moves the extent to main; less, and it is a victim
    in main     credit grows by the touches, to at most 3; an extent with credit goes round once
                more and pays 1; an extent without is a victim

shared(refs) is 1 from two guests up and 2 from eight up. Main adds it at the first look and again
with each new touch, not at every look: grants end only when we evict, so refs alone never cool
down, and pages that all guests read once at boot would stay for good.

The queues are sorted by a sequence number, not linked: an extent can leave from the middle (an
image is closed, an operator evicts a range) in O(log n), and a victim that was not evicted after
all returns to the exact place it had.

With a *standby* list, a part of the capacity, use is seen
directly: a victim keeps its bytes there for a while, and a guest that uses it again says so by a
fault, a *soft hit*. The sooner after the unmapping it comes, the hotter the extent is. So touches
and refs are not asked any more:

    in small    every extent that reaches the end goes to standby
    in standby  a touch brings it to main, with 16 credits if it came at once and fewer the more
                others were unmapped meanwhile; what nobody touches is dropped, and is a ghost
    in main     as above; a round costs 1 credit, and only soft hits give any

The small queue is a hundredth of the frames then: it only has to keep what was just loaded from
being unmapped at once.

Extents that take the room of several are too large for the list: they are dropped when they are
unmapped, and are judged by touches and refs beside the others. The shares of queues and ghosts
count extents, whatever room they take.

Left out: the paper's counters per read (we have no reads to count), and going round until
everything hot has cooled: right after a hundred guests attach that would be four rounds of the
whole cache while loaders wait. Instead, a call that has passed over PATIENCE extents per victim
ignores heat.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from math import ceil
from typing import Protocol

from sortedcontainers import SortedDict

from cowshed.cache.errors import CapacityError, InvariantError, UsageError

ExtentKey = tuple[int, int]
"""(image_no, extent_no)."""

MAX_CREDIT = 3
"""Rounds of main that heat can buy."""
PROMOTING_CREDIT = 2
"""Credit that moves an extent from small to main; 1 may be just the fault that loaded it."""
SMALL_SHARE = 10
"""The small queue's part of the capacity is one in this many."""
SMALL_SHARE_STANDBY = 100
"""The same with a standby list, of the frames."""
MAX_CREDIT_STANDBY = 16
"""Rounds of main that a soft hit can buy."""
PATIENCE = 32
"""Wanted extents that a call passes over per victim. Past that it ignores heat: loaders are
waiting, and passing this many takes about as long as the load that the victim makes room for."""


class Heat(Protocol):
    """What the ledger knows about resident extents; asked about tracked keys only."""

    def take_touches(self, key: ExtentKey, /) -> int:
        """Count faults on the extent since the last call (at most MAX_CREDIT); clear them."""

    def refs(self, key: ExtentKey, /) -> int:
        """Count the guests that were granted the extent."""

    def evictable(self, key: ExtentKey, /) -> bool:
        """Return whether the extent may be evicted now: resident, not pinned, not held."""


class EvictionPolicy:
    """Orders resident extents from cold to hot; picks victims, evicts nothing itself.

    The capacity only sets the queues' shares: the store enforces it. Not thread-safe.

    Invariants:
    1. Every tracked key has one place: a sequence number, unique, less than the next to be given.
    2. At its place it is in exactly one of small, main and chosen; chosen names the queue it left.
    3. Credit is kept for keys of main only, those looked at since they got there: 0 to MAX_CREDIT,
       with standby MAX_CREDIT_STANDBY.
    4. No ghost is tracked, and there are at most nr_ghosts_max, nine tenths of the capacity.
    5. No extent in standby is tracked or a ghost.
    """

    def __init__(
        self,
        capacity_extents: int,
        standby_extents: int = 0,
        room_of: Callable[[ExtentKey], int] | None = None,
    ) -> None:
        """Start with nothing resident; standby_extents: in the standby list at most, 0: none.

        room_of: how much of the capacity an extent takes, None: all take 1. The list has only those
        that take 1.
        Raises UsageError for a capacity of less than one extent.
        """
        if capacity_extents < 1:
            raise UsageError(
                f"capacity of {capacity_extents} extents is too small: give at least 1"
            )
        self._room_of = room_of
        frames = capacity_extents - standby_extents
        self.has_standby = standby_extents > 0
        self.nr_small_wanted = max(
            1, frames // (SMALL_SHARE_STANDBY if self.has_standby else SMALL_SHARE)
        )
        self.nr_ghosts_max = max(1, capacity_extents - max(1, capacity_extents // SMALL_SHARE))
        self._next_place = 0
        self._places: dict[ExtentKey, int] = {}
        self._small: SortedDict[int, ExtentKey] = SortedDict()
        self._main: SortedDict[int, ExtentKey] = SortedDict()
        self._chosen: dict[ExtentKey, SortedDict[int, ExtentKey]] = {}
        self._credits: dict[ExtentKey, int] = {}
        self._ghosts: OrderedDict[ExtentKey, None] = OrderedDict()
        self._standby: set[ExtentKey] = set()

    def __len__(self) -> int:
        """Count the tracked extents, chosen victims included."""
        return len(self._places)

    def __contains__(self, key: ExtentKey) -> bool:
        """Return whether the extent is tracked: admitted, and not forgotten since."""
        return key in self._places

    def remembers(self, key: ExtentKey) -> bool:
        """Return whether the extent was evicted lately: a load of it now means it was too early."""
        return key in self._ghosts

    def admit(self, keys: Iterable[ExtentKey]) -> None:
        """Track extents that became resident, in that order; O(log n) each.

        Raises InvariantError at a key that is tracked already; those before it are admitted.
        """
        places, ghosts = self._places, self._ghosts
        for key in keys:
            if key in places:
                raise InvariantError(
                    f"extent {key} became resident twice: forget it when it is evicted"
                )
            self._standby.discard(key)  # loaded ahead: nobody has used it
            if key in ghosts:
                del ghosts[key]
                self._append(self._main, key)
            else:
                self._append(self._small, key)

    def choose_victims(self, nr_extents: int, heat: Heat) -> list[ExtentKey]:
        """Name evictable extents that together have the room of nr_extents, coldest first.

        They have less only if there are no more, and more only if the last is a large one. Evicts
        nothing: the caller punches them, then calls forget(); a victim not forgotten by the next
        call is considered again, at its old place. Takes touches and spends credit. About
        O(nr_extents log n); O(n log n) when most of the cache is pinned.

        Raises UsageError for fewer than one extent and CapacityError if nothing is evictable.
        """
        if nr_extents < 1:
            raise UsageError(f"cannot choose {nr_extents} victims: ask for at least 1")
        self._return_chosen()
        small, main = self._small, self._main
        victims: list[ExtentKey] = []
        room = 0  # of the victims
        seen_from_place = self._next_place  # places given from here on: seen in this call
        nr_small_unseen = len(small)
        nr_stuck = 0  # extents of main passed in a row since anything changed; all of them: give up
        patience = PATIENCE * nr_extents
        small_due = len(small) >= self.nr_small_wanted  # decided per victim: main must not lose
        while room < nr_extents:  # what small promotes before the rest of small is seen
            if nr_small_unseen and (small_due or nr_stuck >= len(main)):
                nr_small_unseen -= 1
                small_due = True
                queue = small
                place, key = small.peekitem(0)
                if not heat.evictable(key):
                    self._move(small, place, small, key)
                    continue
                if patience > 0 and self._is_wanted(key, heat):
                    self._move(small, place, main, key)
                    patience -= 1
                    nr_stuck = 0
                    continue
            elif nr_stuck < len(main):
                queue = main
                place, key = main.peekitem(0)
                if not heat.evictable(key):
                    self._move(main, place, main, key)
                    nr_stuck += 1
                    continue
                nr_stuck = 0
                credit = self._credit(key, heat, seen=place >= seen_from_place)
                if credit and patience > 0:
                    self._credits[key] = credit - 1
                    self._move(main, place, main, key)
                    patience -= 1
                    continue
            else:
                break
            del queue[place]
            self._chosen[key] = queue
            victims.append(key)
            room += self._room_of(key) if self._room_of else 1
            small_due = len(small) >= self.nr_small_wanted
        if not victims:
            raise CapacityError(
                f"none of {len(self)} resident extents can be evicted: "
                "unpin some or raise the capacity"
            )
        return victims

    def forget(self, keys: Iterable[ExtentKey], *, evicted: bool) -> None:
        """Stop tracking extents that are no longer resident; O(log n) each.

        evicted: they become ghosts, since one that comes back soon was evicted too early; otherwise
        they are gone for another reason. Raises InvariantError at a key that is not tracked; those
        before it are forgotten.
        """
        for key in keys:
            self._remove(key)
            if evicted:
                self._add_ghost(key)

    def unmap(self, keys: Iterable[ExtentKey]) -> None:
        """Stop tracking extents whose bytes went to the standby list, in that order; O(log n) each.

        Raises InvariantError at a key that is not tracked; those before it are in standby.
        """
        for key in keys:
            self._remove(key)
            self._standby.add(key)

    def touch(self, key: ExtentKey, age: float) -> None:
        """Note that a guest's touch brought an extent, a sample perhaps, back; O(log n).

        age says after how many others were unmapped, as a part of the list's length: 0 to 1.
        """
        self._standby.discard(key)
        self._ghosts.pop(key, None)
        if key in self._chosen:
            return
        place = self._places.get(key)
        if place is not None and place in self._small:
            del self._small[place]
        if place is None or place not in self._main:
            self._append(self._main, key)
        credit = ceil((1 - age) * MAX_CREDIT_STANDBY)
        self._credits[key] = max(credit, self._credits.get(key, 0))

    def drop(self, key: ExtentKey) -> None:
        """Remember an extent that left the standby list untouched, a sample perhaps, as a ghost."""
        if key in self._standby:
            self._standby.remove(key)
        elif key in self._places:
            self._remove(key)
        else:
            return
        self._add_ghost(key)

    def drop_image(self, image_no: int) -> None:
        """Forget all about an image, ghosts too, so that its number may be used again; O(n)."""
        self.forget([key for key in self._places if key[0] == image_no], evicted=False)
        for key in [key for key in self._ghosts if key[0] == image_no]:
            del self._ghosts[key]
        self._standby = {key for key in self._standby if key[0] != image_no}

    def check(self) -> None:
        """Recompute the invariants from scratch; O(n). Raises InvariantError naming one broken."""
        found = {key: place for queue in (self._small, self._main) for place, key in queue.items()}
        nr_queued = len(self._small) + len(self._main)
        found.update((key, self._places.get(key, -1)) for key in self._chosen)
        places = self._places.values()
        _require(found == self._places, 1, "places disagree with the queues")
        _require(len(set(places)) == len(places), 1, "two extents share a place")
        _require(
            all(0 <= place < self._next_place for place in places), 1, "a place was never given"
        )
        _require(len(found) == nr_queued + len(self._chosen), 2, "an extent is in two queues")
        queues = (self._small, self._main)
        _require(
            all(any(q is o for o in queues) for q in self._chosen.values()), 2, "unknown queue"
        )
        of_main = set(self._main.values()) | {k for k, q in self._chosen.items() if q is self._main}
        _require(self._credits.keys() <= of_main, 3, "credit outside main")
        _require(
            all(0 <= c <= MAX_CREDIT_STANDBY for c in self._credits.values()),
            3,
            "credit out of range",
        )
        _require(self._ghosts.keys().isdisjoint(self._places), 4, "a ghost is resident")
        _require(len(self._ghosts) <= self.nr_ghosts_max, 4, "too many ghosts")
        _require(self._standby.isdisjoint(self._places), 5, "a standby extent is resident")
        _require(self._standby.isdisjoint(self._ghosts), 5, "a standby extent is a ghost")

    def _remove(self, key: ExtentKey) -> None:
        place = self._places.pop(key, None)
        if place is None:
            raise InvariantError(f"extent {key} is not tracked: admit it when it becomes resident")
        if self._chosen.pop(key, None) is None:
            del (self._small if place in self._small else self._main)[place]
        self._credits.pop(key, None)

    def _add_ghost(self, key: ExtentKey) -> None:
        self._ghosts[key] = None
        if len(self._ghosts) > self.nr_ghosts_max:
            self._ghosts.popitem(last=False)

    def _append(self, queue: "SortedDict[int, ExtentKey]", key: ExtentKey) -> None:
        place = self._next_place
        self._next_place = place + 1
        queue[place] = key
        self._places[key] = place

    def _move(
        self,
        queue: "SortedDict[int, ExtentKey]",
        place: int,
        to_queue: "SortedDict[int, ExtentKey]",
        key: ExtentKey,
    ) -> None:
        del queue[place]
        self._append(to_queue, key)

    def _return_chosen(self) -> None:
        for key, queue in self._chosen.items():
            queue[self._places[key]] = key
        self._chosen.clear()

    def _is_kept(self, key: ExtentKey) -> bool:
        """Whether the extent, unmapped, goes to the standby list: then that shows its use."""
        return self.has_standby and (not self._room_of or self._room_of(key) == 1)

    def _is_wanted(self, key: ExtentKey, heat: Heat) -> bool:
        """Return whether an extent of small has earned a place in main; takes its touches."""
        if self._is_kept(key):
            return False
        return heat.take_touches(key) + _shared(heat.refs(key)) >= PROMOTING_CREDIT

    def _credit(self, key: ExtentKey, heat: Heat, *, seen: bool) -> int:
        """Return the credit of an extent of main at this look.

        At a second look in one call (seen) its touches are not taken: guests that fault faster than
        the call goes round must not prolong it.
        """
        credit = self._credits.get(key)
        if self._is_kept(key):
            return credit or 0
        if seen and credit is not None:
            return credit
        touches = 0 if seen else heat.take_touches(key)
        if touches or credit is None:
            return min(MAX_CREDIT, (credit or 0) + touches + _shared(heat.refs(key)))
        return credit


def _shared(refs: int) -> int:
    return (refs >= 2) + (refs >= 8)


def _require(holds: bool, invariant_no: int, what: str) -> None:
    if not holds:
        raise InvariantError(f"eviction policy, invariant {invariant_no}: {what}: report this bug")
