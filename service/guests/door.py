# SPDX-License-Identifier: Apache-2.0
"""Who may come in: bounds the connections, in all and of one user, so that nobody is locked out.

A connection that has said hello may stay quiet for as long as it likes, so floods are bounded by
number and not by time. Operators (root and the daemon's user) always find a place.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Hashable
from typing import Final

from cowshed.transport.foreign_fds import is_full

__all__ = ["Door"]

# A guest takes socket, userfaultfd, two of /proc, pidfd, eventfd, ledger, purse and record; and one
# to spare.
_FDS_PER_GUEST: Final = 10
_FDS_OF_OURS: Final = 128
# Places that only operators get.
_RESERVED: Final = 16


class Door:
    """Counts who is in, by user or, where no kernel vouches for one, by address.

    Invariant: readmit(), or enter() that returned "", is followed by one leave() of the same who
    and nr_files.
    """

    def __init__(self, max_files: int) -> None:
        self._max_files = max((_RESERVED + 2) * _FDS_PER_GUEST, max_files - _FDS_OF_OURS)
        self._nr_files: Counter[Hashable] = Counter()
        self._nr_inside: Counter[Hashable] = Counter()
        self._operators: Final = {0, os.geteuid()}

    def enter(self, who: Hashable, nr_files: int = _FDS_PER_GUEST) -> str:
        """Let a connection in that takes so many descriptors; or say why not.

        who is a uid, or what names an address.
        """
        nr_taken = self._nr_files.total() + nr_files
        if who not in self._operators:
            if is_full():
                return "descriptors that peers sent wait to be closed"
            nr_common = self._max_files - _RESERVED * _FDS_PER_GUEST
            if self._nr_files[who] + nr_files > nr_common // 2:
                name = f"uid {who}" if isinstance(who, int) else str(who)
                return f"{name} has {self._nr_inside[who]} connections open"
            if nr_taken > nr_common:
                return f"{self._nr_inside.total()} connections are open"
        elif nr_taken > self._max_files:
            return f"{self._nr_inside.total()} connections are open"
        self._nr_files[who] += nr_files
        self._nr_inside[who] += 1
        return ""

    def readmit(self, who: Hashable, nr_files: int = _FDS_PER_GUEST) -> None:
        """Count a connection that our predecessor let in, however many there are."""
        self._nr_files[who] += nr_files
        self._nr_inside[who] += 1

    def leave(self, who: Hashable, nr_files: int = _FDS_PER_GUEST) -> None:
        """A connection of who has ended."""
        self._nr_files[who] -= nr_files
        self._nr_inside[who] -= 1
        if not self._nr_inside[who]:
            del self._nr_files[who], self._nr_inside[who]
