# SPDX-License-Identifier: Apache-2.0
"""The restart history: how often a backend followed another, and why; who starts the next one."""

from __future__ import annotations

import time
from typing import Any, Final

from cowshed.service.persist.kept_counts import KeptCounts
from cowshed.service.supervise.keeper_watch import KeeperWatch

__all__ = ["HISTORY_COUNTS", "HOWS", "KEEPERS", "RestartHistory"]

# Why a backend followed another; a restart by systemd is a reload too.
HOWS: Final = ("crash", "reload", "takeover")
KEEPERS: Final = ("own", "systemd", "none")
# The counters: a backend that leaves on purpose counts left-*, which its successor compares.
HISTORY_COUNTS: Final = ("starts", *HOWS, "left-reload", "left-takeover")


class RestartHistory:
    """Goes on with the counts of earlier backends. watch is the keeper's; None: no keeper.

    adoption_seconds is the time from our start until all inherited guests were served, 0.0 for the
    first backend.
    """

    def __init__(self, counts: KeptCounts | None = None, watch: KeeperWatch | None = None) -> None:
        self._counts = counts or KeptCounts(HISTORY_COUNTS)
        self._began = time.monotonic()
        self.adoption_seconds = 0.0
        self._watch: Final = watch
        before = self._counts.read()
        self._is_first = not before["starts"]
        if not self._is_first:
            planned = (how for how in HOWS[1:] if before[f"left-{how}"] > before[how])
            self._counts.add(next(planned, "crash"))
        self._counts.add("starts")

    def close(self) -> None:
        """Close the counts."""
        self._counts.close()

    @property
    def is_first(self) -> bool:
        """Whether there was no backend before this one."""
        return self._is_first

    def note_adopted(self) -> None:
        """Record that all guests of the predecessor are served."""
        if not self._is_first:
            self.adoption_seconds = time.monotonic() - self._began

    def note_leaving(self, how: str) -> None:
        """Record that this backend leaves now; how is one of HOWS except "crash"."""
        counts = self._counts.read()
        self._counts.add(f"left-{how}", max(0, counts[how] + 1 - counts[f"left-{how}"]))

    @property
    def restarts(self) -> dict[str, int]:
        """How often a backend followed another, by HOWS."""
        counts = self._counts.read()
        return {how: counts[how] for how in HOWS}

    @property
    def keeper(self) -> str:
        """What holds everything for the successor and starts it: one of KEEPERS."""
        return "none" if self._watch is None else self._watch.kind

    @property
    def nr_not_held(self) -> int:
        """How many groups of descriptors a successor would lack if this backend died now."""
        return 0 if self._watch is None else self._watch.nr_not_held

    def status(self) -> dict[str, Any]:
        """Return its part of the status."""
        restarts = self.restarts
        return {
            "generation": 1 + sum(restarts.values()),
            "restarts": restarts,
            "keeper": self.keeper,
            "not_held": self.nr_not_held,
            "adoption_seconds": self.adoption_seconds,
        }
