# SPDX-License-Identifier: Apache-2.0
"""Leaving on purpose, so that nobody who came to us is turned away by it.

Who comes from now on waits in the queues of the listening sockets, which our successor has too. Who
is in the middle of something with us gets its answer first, for as long as patience lasts: faults
are answered all the while. Only then do we go.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

from cowshed.service.runtime.loop import LEAVE, Loop
from cowshed.service.runtime.stops import stop_at
from cowshed.service.runtime.workers import Workers

__all__ = ["Departure", "Saving", "Visited"]

_LOOK_SECONDS: Final = 0.002
# Who does not get on in this time is no guest that waits for us: it hangs up, or comes again.
_PATIENCE_SECONDS: Final = 1.0


class Visited(Protocol):
    """What accepts connections, in the loop."""

    def nr_unfinished(self) -> int:
        """How many would lose something if we ended now; those at rest need not be read again."""


class Saving:
    """What is to be written before we go, in a thread: a disk that hangs keeps us only so long."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._nr_begun = self._nr_done = 0

    def begin(self, save: Callable[[], None]) -> None:
        """Do something before we go."""
        self._nr_begun += 1

        def work() -> None:
            try:
                save()
            finally:
                self._nr_done += 1

        self._workers.run(work)

    def nr_unfinished(self) -> int:
        """How much of it is under way still."""
        return self._nr_begun - self._nr_done


class Departure:
    """Makes everybody ready for our end; take_back() makes it as it was."""

    def __init__(
        self, loop: Loop, listening_fds: Iterable[int], servers: Sequence[Visited]
    ) -> None:
        self._loop = loop
        self._listening_fds = listening_fds
        self._servers = servers
        self._deadline = 0.0

    def prepare(self) -> bool:
        """Run the loop until all are ready, or patience ends; False if we are to stop for good."""
        for fd in list(self._listening_fds):  # a side thread may open another
            self._loop.mute(fd)
        stop_at("departing")
        self._deadline = time.monotonic() + _PATIENCE_SECONDS
        self._loop.begin_again()
        self._look()
        self._loop.run()
        return self._loop.ended_by is LEAVE

    def take_back(self) -> None:
        """Let people in again, and answer them."""
        self._loop.unmute_all()

    def _look(self) -> None:
        if (
            any(server.nr_unfinished() for server in self._servers)
            and time.monotonic() < self._deadline
        ):
            self._loop.once(_LOOK_SECONDS, self._look)
        else:
            self._loop.leave()
