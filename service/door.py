# SPDX-License-Identifier: Apache-2.0
"""Who may come in: bounds the connections, in all and of one user, so that nobody is locked out.

A connection that has said hello may stay quiet for as long as it likes, so floods are bounded by
number and not by time. Operators (root and the daemon's user) always find a place.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections import Counter
from typing import Final

__all__ = ["Door", "raise_file_limit"]

# A guest takes socket, userfaultfd, two of /proc, pidfd, eventfd, ledger and purse; one to spare.
_FDS_PER_GUEST: Final = 9
_FDS_OF_OURS: Final = 128
# Places that only operators get.
_RESERVED: Final = 16


def raise_file_limit() -> int:
    """Raise the limit of open files as far as it goes, and return it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


class Door:
    """Counts who is in, by user.

    Invariant: enter() that returned "" is followed by one leave() of the same uid.
    """

    def __init__(self, max_files: int) -> None:
        self._max = max(_RESERVED + 2, (max_files - _FDS_OF_OURS) // _FDS_PER_GUEST)
        self._inside: Counter[int] = Counter()
        self._operators: Final = {0, os.geteuid()}

    def enter(self, uid: int) -> str:
        """Let a connection of uid in; or say why not."""
        nr_inside = self._inside.total()
        if uid not in self._operators:
            nr_places = self._max - _RESERVED
            if self._inside[uid] >= nr_places // 2:
                return f"uid {uid} has {self._inside[uid]} connections open"
            if nr_inside >= nr_places:
                return f"{nr_inside} connections are open"
        elif nr_inside >= self._max:
            return f"{nr_inside} connections are open"
        self._inside[uid] += 1
        return ""

    def leave(self, uid: int) -> None:
        """A connection of uid has ended."""
        self._inside[uid] -= 1
        if not self._inside[uid]:
            del self._inside[uid]
