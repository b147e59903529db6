# SPDX-License-Identifier: Apache-2.0
"""Whether to compress the pages of a handoff, by what it has cost so far.

Compression saves time on a link that is slower than it, and costs time on a faster one. Which holds
depends on the link, the pages and the load of both hosts, so the sender measures both ways: it uses
the one that took less time for each byte, and now and then tries the other.
"""

from __future__ import annotations

from typing import Final

__all__ = ["CompressionChoice"]

_TRY_EVERY: Final = 16
_WEIGHT: Final = 0.25  # of the latest frame in a mean


class CompressionChoice:
    """Chooses before each frame; note() must follow with what it cost.

    Invariant: _cost has, for each way that was tried, the mean seconds that a byte took.
    """

    def __init__(self) -> None:
        self._cost: dict[bool, float] = {}
        self._nr_frames = 0
        self._is_on = True

    def next(self) -> bool:
        """Return whether to compress the next frame."""
        self._nr_frames += 1
        if len(self._cost) < 2:
            self._is_on = True not in self._cost
        else:
            is_better = self._cost[True] < self._cost[False]
            self._is_on = is_better != (self._nr_frames % _TRY_EVERY == 0)
        return self._is_on

    def note(self, nr_bytes: int, seconds: float) -> None:
        """Note how long it took to encode and send a frame of so many bytes of pages."""
        cost = seconds / max(1, nr_bytes)
        before = self._cost.get(self._is_on, cost)
        self._cost[self._is_on] = before + _WEIGHT * (cost - before)
