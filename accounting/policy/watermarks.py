# SPDX-License-Identifier: Apache-2.0
"""How much room the background evictor keeps free.

As with the kernel's kswapd, two marks: when free room falls below low_free the evictor raises it to
high_free again, so that loaders seldom wait for an eviction, and an eviction is seldom for one
extent only. With one mark, every single load would wake the evictor.
"""

from dataclasses import dataclass, field

from cowshed.cache.errors import InvariantError, UsageError

LOW_SHARE = 32
"""low_free is one in this many of the capacity."""
HIGH_SHARE = 16
"""high_free is one in this many of the capacity."""
MOST_SHARE = 8
"""Small caches round up, but never keep free more than one in this many (and always one extent)."""
MOST_EXTENTS = 4096
"""Large caches keep no more free than this (256 MiB of 64 KiB extents): bursts grow no further."""


@dataclass(frozen=True, slots=True)
class Watermarks:
    """The free room, in extents, at which background eviction begins and ends.

    largest_extent is the room of the largest extent, if some take more than one: a load of it must
    find so much. Always largest_extent <= low_free <= high_free <= capacity_extents -
    largest_extent, so that an extent can stay. Raises UsageError for a capacity of less than two of
    the largest extents.
    """

    capacity_extents: int
    largest_extent: int = 1
    low_free: int = field(init=False)
    high_free: int = field(init=False)

    def __post_init__(self) -> None:
        """Derive both marks from the capacity."""
        capacity, largest = self.capacity_extents, self.largest_extent
        if capacity < 2 * largest:
            raise UsageError(
                f"capacity of {capacity} extents is too small: give at least {2 * largest}"
            )
        low = max(largest, min(capacity // LOW_SHARE, MOST_EXTENTS // 2))
        high = max(low + largest, min(capacity // HIGH_SHARE, MOST_EXTENTS))
        object.__setattr__(self, "low_free", low)
        object.__setattr__(self, "high_free", min(high, max(largest, capacity // MOST_SHARE)))

    def nr_to_evict(self, free_extents: int) -> int:
        """Return how many extents the evictor must evict now: 0 unless free room is below low_free.

        Keeps no state between calls: the evictor finishes one order before it asks for the next.
        Raises InvariantError if free_extents is not within 0 and the capacity.
        """
        if not 0 <= free_extents <= self.capacity_extents:
            raise InvariantError(
                f"{free_extents} extents free of {self.capacity_extents}: "
                "the count is wrong, report this bug"
            )
        return self.high_free - free_extents if free_extents < self.low_free else 0
