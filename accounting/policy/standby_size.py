# SPDX-License-Identifier: Apache-2.0
"""How long the standby list should be: as long as it costs little beside the misses.

The list costs copies: of each victim into it, and of each soft hit out of it, which a guest waits
for. It gains what the policy learns: fewer misses. How many fewer depends on the load; on Zipf-like
loads it is about a fifth of what FIFO has, whatever a miss costs. So with a slow source the list
pays at any length, and with a fast one its copies must stay a small part of the time that misses
take: the list shrinks while they are more than COST_MOST of it, and grows while they are less than
COST_LEAST. A shorter list costs less, because fewer extents are touched while they are in it.
"""

from dataclasses import dataclass, field

COST_MOST = 0.5
"""Shrink if copies take more CPU time than this part of the time that reads of the source take."""
COST_LEAST = 0.3
"""Grow if they take less."""
LEAST_SHARE = 10
LEAST_EXTENTS = 32
"""The list never gets shorter than one in LEAST_SHARE of its longest, nor, if that may be as long,
than LEAST_EXTENTS: it would show nothing, and have no room for samples."""
LOADS_PER_STEP = 256
"""Loads that a step is decided on."""
STEP = 1.1
"""The factor of a step."""


@dataclass
class StandbySize:
    """The length of the list, in extents: longest to begin with, which may be 0."""

    longest: int
    extents: float = field(init=False)
    _loads: int = 0
    _read_ns: int = 0
    _copy_ns: int = 0

    def __post_init__(self) -> None:
        """Begin with the longest."""
        self.extents = self.longest

    def note(self, loads: int, read_ns: int, copy_ns: int) -> None:
        """Count loads, the time they took, and the time of copies into and out of the list."""
        self._loads += loads
        self._read_ns += read_ns
        self._copy_ns += copy_ns
        if self._loads < LOADS_PER_STEP:
            return
        cost = self._copy_ns / max(1, self._read_ns)
        if cost > COST_MOST:
            least = max(self.longest / LEAST_SHARE, min(self.longest, LEAST_EXTENTS))
            self.extents = max(least, self.extents / STEP)
        elif cost < COST_LEAST:
            self.extents = min(float(self.longest), self.extents * STEP)
        self._loads = self._read_ns = self._copy_ns = 0
