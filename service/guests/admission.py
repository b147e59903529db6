# SPDX-License-Identifier: Apache-2.0
"""The limit of connections, in all and per user, so that no user locks out the others.

A connection may stay idle after its hello without limit, so floods are bounded by number and not by
time. Some places are reserved for operators (root and the daemon's user).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Hashable
from typing import Final

from cowshed.transport.links.foreign_fds import is_full
from cowshed.transport.links.no_room import no_room

__all__ = ["Admission"]

# Socket, userfaultfd, two of /proc, pidfd, eventfd, ledger, quota, record; and one to spare.
_FDS_PER_GUEST: Final = 10
_FDS_OF_OURS: Final = 128
# For images added later, files read now and then, and the acceptors' reserves.
_FDS_TO_COME: Final = 64
# Places that only operators get.
_RESERVED: Final = 16


class Admission:
    """Counts connections by user or, if the kernel reports none, by address.

    Invariant: each readmit(), and each enter() that returned "", is followed by one leave() with
    the same who and nr_files.
    """

    def __init__(self, max_files: int) -> None:
        self._limit: Final = max_files
        self._max_files = self._places(_FDS_OF_OURS)
        self._nr_files: Counter[Hashable] = Counter()
        self._nr_inside: Counter[Hashable] = Counter()
        self._operators: Final = {0, os.geteuid()}

    def enter(self, who: Hashable, nr_files: int = _FDS_PER_GUEST) -> str:
        """Admit a connection of nr_files descriptors and return "", or return why not.

        who is a uid or the name of an address.
        """
        nr_taken = self._nr_files.total() + nr_files
        nr_places = self._max_files
        if who not in self._operators:
            if is_full():
                return no_room("descriptors that peers sent wait to be closed")
            nr_places -= _RESERVED * _FDS_PER_GUEST
            if self._nr_files[who] + nr_files > nr_places // 2:
                name = f"uid {who}" if isinstance(who, int) else str(who)
                return self._refusal(f"{name} has {self._nr_inside[who]} connections open")
        if nr_taken > nr_places:
            return self._refusal(f"{self._nr_inside.total()} connections are open")
        self._nr_files[who] += nr_files
        self._nr_inside[who] += 1
        return ""

    def _refusal(self, why: str) -> str:
        return no_room(
            f"{why}, and the backend's limit of open files ({self._limit}) allows no more; close "
            "some, or raise it (LimitNOFILE=, ulimit -n)"
        )

    def set_aside(self, nr_files: int) -> None:
        """Reserve what the daemon itself has open, if that is more than assumed before.

        nr_files counts all open descriptors, including those of admitted connections.
        """
        nr_ours = nr_files - self._nr_files.total() + _FDS_TO_COME
        self._max_files = self._places(max(_FDS_OF_OURS, nr_ours))

    def _places(self, nr_ours: int) -> int:
        return max((_RESERVED + 2) * _FDS_PER_GUEST, self._limit - nr_ours)

    def readmit(self, who: Hashable, nr_files: int = _FDS_PER_GUEST) -> None:
        """Count a connection that our predecessor admitted, even beyond the limit."""
        self._nr_files[who] += nr_files
        self._nr_inside[who] += 1

    def leave(self, who: Hashable, nr_files: int = _FDS_PER_GUEST) -> None:
        """Give back the place of a connection that has ended."""
        self._nr_files[who] -= nr_files
        self._nr_inside[who] -= 1
        if not self._nr_inside[who]:
            del self._nr_files[who], self._nr_inside[who]
