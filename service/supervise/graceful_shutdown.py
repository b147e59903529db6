# SPDX-License-Identifier: Apache-2.0
"""A graceful shutdown: this process ends for a successor, and no peer is turned away by it.

Peers that connect from then on wait in the queues of the listening sockets, which the successor has
too. Handshakes and requests under way are answered first, for a bounded time; faults are answered
all the while. Only then does the process end.
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
# A peer that takes longer does not wait for this process: it hangs up, or connects again. On a busy
# machine the time may go by before this process runs at all, so it also looks so many times.
_PATIENCE_SECONDS: Final = 1.0
_PATIENCE_LOOKS: Final = 50


class Drainable(Protocol):
    """A server that accepts connections in the loop."""

    def nr_unfinished(self) -> int:
        """Return how many would lose something if the process ended now."""


class Saving:
    """Files to be written before the end, in a thread: a disk that hangs delays it only so long."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._nr_begun = self._nr_done = 0

    def begin(self, save: Callable[[], None]) -> None:
        """Have save() called; the shutdown waits for it."""
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
    """Brings every server to rest before the end; take_back() has them go on."""

    def __init__(
        self, loop: Loop, listening_fds: Iterable[int], servers: Sequence[Drainable]
    ) -> None:
        self._loop = loop
        self._listening_fds = listening_fds
        self._servers = servers
        self._deadline = 0.0
        self._nr_looks = 0

    def prepare(self) -> bool:
        """Run the loop until all are ready, or patience ends; False if we are to stop for good."""
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
        """Let people in again, and answer them."""
        self._loop.unmute_all()

    def _look(self) -> None:
        self._nr_looks += 1
        is_patient = self._nr_looks < _PATIENCE_LOOKS or time.monotonic() < self._deadline
        if is_patient and any(server.nr_unfinished() for server in self._servers):
            self._loop.once(_LOOK_SECONDS, self._look)
        else:
            self._loop.leave()
