# SPDX-License-Identifier: Apache-2.0
"""What the daemon itself counts and remembers for metrics; all else the core counts."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from cowshed.service.metrics.catalog import CHECKS, DROP_REASONS
from cowshed.service.persist.kept_counts import KeptCounts

__all__ = ["DROP_COUNTS", "DrainStatistics", "ServiceCounters"]

_DROPPED: Final = "dropped/"
# What is counted, by the names that the counts are kept under.
DROP_COUNTS: Final = tuple(f"{_DROPPED}{reason}" for reason in DROP_REASONS)


@dataclass(frozen=True)
class DrainStatistics:
    """How far a drain is: state is one of DRAIN_STATES."""

    state: str = "none"
    progress_ratio: float = 0.0
    nr_blockers: int = 0


class ServiceCounters:
    """What the daemon counts itself; for any thread.

    Connections dropped, by DROP_REASONS, are counted on by a successor that has the same counts.
    audited_at is in Unix time, 0.0 before the first audit of this process; mismatches counts what
    the last one found, by CHECKS.
    """

    def __init__(self, counts: KeptCounts | None = None) -> None:
        self._counts = counts or KeptCounts(DROP_COUNTS)
        self.audited_at = 0.0
        self.mismatches = dict.fromkeys(CHECKS, 0)
        self.drain = DrainStatistics()

    def close(self) -> None:
        """Let go of the counts."""
        self._counts.close()

    def note_dropped(self, reason: str) -> None:
        """A connection was ended or turned away, for one of DROP_REASONS."""
        self._counts.add(f"{_DROPPED}{reason}")

    @property
    def dropped(self) -> dict[str, int]:
        """Connections that were, by reason."""
        counts = self._counts.read()
        return {reason: counts[f"{_DROPPED}{reason}"] for reason in DROP_REASONS}

    def note_audit(self, checks: Iterable[str]) -> None:
        """An audit ended; checks has the name of the check for each mismatch it found."""
        mismatches = dict.fromkeys(CHECKS, 0)
        for check in checks:
            mismatches[check] += 1
        self.mismatches = mismatches
        self.audited_at = time.time()
