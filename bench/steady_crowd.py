# SPDX-License-Identifier: Apache-2.0
"""The measuring side of a crowd of steady.py: spans of time, and the stalls in them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from backend import BENCH, BenchError
from steady import Shared, Terms

__all__ = ["SteadyCrowd", "wait_until"]

START_SECONDS = 60.0
# A longer stall is an error: the case ends instead of waiting.
STALL_SECONDS = 30.0
SPANS = 256


def wait_until(what: str, seconds: float, is_so: Callable[[], bool]) -> None:
    """Poll until is_so() is true; BenchError after so many seconds."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            raise BenchError(f"timed out after {seconds:g} s: {what}")
        time.sleep(0.002)


class SteadyCrowd:
    """Guests that run for the length of the block."""

    def __init__(self, build_dir: Path, terms: Terms) -> None:
        self.terms = terms
        self._memory = os.memfd_create("bench-steady")
        self._shared = Shared(self._memory, terms.nr_guests)
        self._span = 0
        self._process = subprocess.Popen(
            [
                sys.executable,
                str(BENCH / "steady.py"),
                str(build_dir),
                str(self._memory),
                terms.as_json(),
            ],
            pass_fds=[self._memory],
        )

    def __enter__(self) -> Self:
        try:
            self._wait("all guests run", START_SECONDS, self._all_run)
        except BaseException:
            self._process.kill()
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._shared.order.stop = 1
        try:
            self._process.wait(STALL_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._memory)

    def _all_run(self) -> bool:
        notes = self._shared.guests
        return all(notes[no].nr_made > 0 for no in range(self.terms.nr_guests))

    def _wait(self, what: str, seconds: float, is_so: Callable[[], bool]) -> None:
        def look() -> bool:
            if self._process.poll() is not None:
                raise BenchError(f"guests of {self.terms.name} ended; their output is above")
            return is_so()

        wait_until(f"{what} ({self.terms.name})", seconds, look)

    def begin_span(self) -> int:
        """Count stalls in a new span from now on; return its number."""
        if self._span + 1 == SPANS:
            raise BenchError(f"more than {SPANS} spans; give fewer --rounds")
        self._span += 1
        self._shared.order.span = self._span
        return self._span

    def wait_served(self) -> None:
        """Return once every guest has made progress since the call."""
        guests = self._shared.guests
        before = self.made()
        self._wait(
            "every guest gets on",
            STALL_SECONDS,
            lambda: all(guests[no].nr_made >= nr + 2 for no, nr in enumerate(before)),
        )

    def stalls_ms(self, span: int) -> list[float]:
        """Return the longest stall of each guest in a span that is over."""
        guests = self._shared.guests
        return [guests[no].longest_ns[span] / 1e6 for no in range(self.terms.nr_guests)]

    def made(self) -> list[int]:
        """Return how many accesses each guest has made."""
        return [int(self._shared.guests[no].nr_made) for no in range(self.terms.nr_guests)]

    def nr_failed(self) -> int:
        """Return how many of all accesses failed or returned a wrong byte."""
        return sum(self._shared.guests[no].nr_failed for no in range(self.terms.nr_guests))
