# SPDX-License-Identifier: Apache-2.0
"""A graceful shutdown: this process ends for a successor, and refuses no peer meanwhile.

Peers that connect from then on wait in the backlogs of the listening sockets, which the successor
has too. Handshakes and requests in progress are answered first, for a bounded time; faults are
answered throughout. Only then does the process end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

from cowshed.service.runtime.loop import LEAVE, Loop
from cowshed.service.runtime.stops import stop_at
from cowshed.service.runtime.workers import Workers

__all__ = ["Drainable", "GracefulShutdown", "Saving"]

_LOOK_SECONDS: Final = 0.002
# A peer that takes longer is disconnected, and must connect again. On a busy machine the time may
# pass before this process runs at all, so it also looks at least so many times.
_PATIENCE_SECONDS: Final = 1.0
_PATIENCE_LOOKS: Final = 50


class Drainable(Protocol):
    """A server that accepts connections in the loop."""

    def nr_unfinished(self) -> int:
        """Return how many peers would lose something if the process ended now."""


class Saving:
    """Writes files before the end, in a thread: a hung disk delays the end only a bounded time."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._nr_begun = self._nr_done = 0

    def begin(self, save: Callable[[], None]) -> None:
        """Have a worker call save(); the shutdown waits for it."""
        self._nr_begun += 1

        def work() -> None:
            try:
                save()
            finally:
                self._nr_done += 1

        self._workers.run(work)

    def nr_unfinished(self) -> int:
        """Return how many calls have not ended."""
        return self._nr_begun - self._nr_done


class GracefulShutdown:
    """Brings every server to rest before the process ends; take_back() undoes that."""

    def __init__(
        self, loop: Loop, listening_fds: Iterable[int], servers: Sequence[Drainable]
    ) -> None:
        self._loop = loop
        self._listening_fds = listening_fds
        self._servers = servers
        self._deadline = 0.0
        self._nr_looks = 0

    def prepare(self) -> bool:
        """Run the loop until all servers are at rest or the time is up.

        False if a signal meanwhile asked for an end without a successor.
        """
        for fd in list(self._listening_fds):  # a side thread may open another
            self._loop.mute(fd)
        stop_at("departing")
        self._deadline = time.monotonic() + _PATIENCE_SECONDS
        self._nr_looks = 0
        self._loop.begin_again()
        self._look()
        self._loop.run()
        return self._loop.ended_by is LEAVE

    def take_back(self) -> None:
        """Accept peers again."""
        self._loop.unmute_all()

    def _look(self) -> None:
        self._nr_looks += 1
        is_patient = self._nr_looks < _PATIENCE_LOOKS or time.monotonic() < self._deadline
        if is_patient and any(server.nr_unfinished() for server in self._servers):
            self._loop.once(_LOOK_SECONDS, self._look)
        else:
            self._loop.leave()
