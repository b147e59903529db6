# SPDX-License-Identifier: Apache-2.0
"""A test's handle on a running swarm.py."""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SWARM = Path(__file__).parent / "swarm.py"


class Swarm:
    """nr_guests processes that do a job of swarm.py; end() ends the wait of those that wait."""

    def __init__(
        self, uri: str, job: str, nr_guests: int, rng: random.Random, **arguments: Any
    ) -> None:
        self.nr_guests = nr_guests
        words = [sys.executable, str(SWARM), uri, job, str(nr_guests), str(rng.random())]
        self.process = subprocess.Popen(
            [*words, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def end(self) -> None:
        """Close their standard input."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def results(self, seconds: float = 60.0) -> list[Any]:
        """Wait for one result of each guest, in the guests' order."""
        assert self.process.stdout is not None
        results: dict[int, Any] = {}
        deadline = time.monotonic() + seconds
        buffer = b""
        fd = self.process.stdout.fileno()
        while len(results) < self.nr_guests:
            left = max(0.0, deadline - time.monotonic())
            assert select.select([fd], [], [], left)[0], f"{len(results)} results in {seconds} s"
            piece = os.read(fd, 1 << 16)
            assert piece, f"the swarm ended after {len(results)} results"
            *lines, buffer = (buffer + piece).split(b"\n")
            for line in lines:
                result = json.loads(line)
                assert "error" not in result, result["error"]
                results[result["no"]] = result["ok"]
        return [results[no] for no in range(self.nr_guests)]
