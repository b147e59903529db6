# SPDX-License-Identifier: Apache-2.0
"""What the daemon itself counts and remembers for metrics; all else the core counts."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from cowshed.service.metrics.catalog import CHECKS, DROP_REASONS

__all__ = ["DrainFigures", "Tallies"]


@dataclass(frozen=True)
class DrainFigures:
    """How far a drain is: state is one of DRAIN_STATES."""

    state: str = "none"
    progress_ratio: float = 0.0
    nr_blockers: int = 0


@dataclass
class Tallies:
    """What the daemon counts itself. Written by one thread each, read by any.

    dropped counts connections by DROP_REASONS; audited_at is in Unix time, 0.0 before the first
    audit; mismatches counts what the last one found, by CHECKS.
    """

    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DROP_REASONS, 0))
    audited_at: float = 0.0
    mismatches: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CHECKS, 0))
    drain: DrainFigures = DrainFigures()

    def note_audit(self, checks: Iterable[str]) -> None:
        """An audit ended; checks has the name of the check for each mismatch it found."""
        mismatches = dict.fromkeys(CHECKS, 0)
        for check in checks:
            mismatches[check] += 1
        self.mismatches = mismatches
        self.audited_at = time.time()
