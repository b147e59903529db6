# SPDX-License-Identifier: Apache-2.0
"""The counters that the daemon itself keeps for metrics; the core keeps all others."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from cowshed.service.metrics.catalog import CHECKS, DROP_REASONS
from cowshed.service.persist.kept_counts import KeptCounts

__all__ = ["DROP_COUNTS", "DrainStatistics", "ServiceCounters"]

_DROPPED: Final = "dropped/"
# The names under which the counts are kept.
DROP_COUNTS: Final = tuple(f"{_DROPPED}{reason}" for reason in DROP_REASONS)


@dataclass(frozen=True)
class DrainStatistics:
    """The progress of a drain; state is one of DRAIN_STATES."""

    state: str = "none"
    progress_ratio: float = 0.0
    nr_blockers: int = 0


class ServiceCounters:
    """The daemon's own counters; for any thread.

    A successor that inherits counts continues the counts of dropped connections, by DROP_REASONS.
    audited_at is in Unix time, 0.0 before the first audit of this process; mismatches has the
    numbers found by the last one, by CHECKS.
    """

    def __init__(self, counts: KeptCounts | None = None) -> None:
        self._counts = counts or KeptCounts(DROP_COUNTS)
        self.audited_at = 0.0
        self.mismatches = dict.fromkeys(CHECKS, 0)
        self.drain = DrainStatistics()

    def close(self) -> None:
        """Close the counts."""
        self._counts.close()

    def note_dropped(self, reason: str) -> None:
        """Count a connection ended or turned away, for one of DROP_REASONS."""
        self._counts.add(f"{_DROPPED}{reason}")

    @property
    def dropped(self) -> dict[str, int]:
        """The dropped connections, by reason."""
        counts = self._counts.read()
        return {reason: counts[f"{_DROPPED}{reason}"] for reason in DROP_REASONS}

    def note_audit(self, checks: Iterable[str]) -> None:
        """Record an audit's result; checks has the name of the check for each mismatch."""
        mismatches = dict.fromkeys(CHECKS, 0)
        for check in checks:
            mismatches[check] += 1
        self.mismatches = mismatches
        self.audited_at = time.time()
