# SPDX-License-Identifier: Apache-2.0
"""A backend under its keeper, as operators run it, that is killed, reloaded and replaced."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from backend import BenchError
from steady_crowd import wait_until

from cowshed.transport import connect

__all__ = ["KeptBackend"]

START_SECONDS = 60.0
# A keeper delays the restart of a backend that dies younger than this.
QUICK_DEATH_SECONDS = 5.0


class KeptBackend:
    """A `cowshed serve` with a keeper and one image, which is resident when the block begins."""

    def __init__(self, image: Path, capacity_bytes: int, *more: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="cowshed-kept-")
        self.run_dir = Path(self._folder.name)
        self.uri = f"unix://{self.run_dir}/cowshed.sock"
        self.image = image
        self._log_path = self.run_dir / "log"
        self._command = [sys.executable, "-m", "cowshed.service.cli", "serve"]
        self._command += ["--run-dir", str(self.run_dir), "--image", f"disk={image}"]
        self._command += ["--capacity", str(capacity_bytes), *more]
        self._log = self._log_path.open("ab")
        self._processes = [self._start()]
        self._born = time.monotonic()
        self._died_quickly = False

    def _start(self, *more: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*self._command, *more], stdout=self._log, stderr=self._log)

    def __enter__(self) -> Self:
        try:
            wait_until("the daemon serves", START_SECONDS, lambda: "event=serving " in self.log())
            self.request("warm", image="disk")
            wait_until("digests", START_SECONDS, lambda: bool(self.image_status()["digest"]))
        except BaseException as error:
            self.__exit__()
            raise BenchError(f"{error}; its log:\n{self.log()}") from error
        return self

    def __exit__(self, *_: object) -> None:
        """End all processes, and remove all files."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        for process in self._processes:
            try:
                process.wait(START_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._log.close()
        self._folder.cleanup()

    def log(self) -> str:
        """Return its log."""
        return self._log_path.read_text() if self._log_path.exists() else ""

    def request(self, op: str, **fields: Any) -> dict[str, Any]:
        """Send one request, as an operator."""
        with connect(self.uri) as backend:
            return dict(backend.request(op, **fields))

    def status(self) -> dict[str, Any]:
        """Return its status."""
        return dict(self.request("status")["status"])

    def image_status(self) -> dict[str, Any]:
        """Return its image's part of the status."""
        (image,) = self.status()["images"]
        return dict(image)

    def tcp_uri(self) -> str:
        """Return the URI for guests by tcp."""
        words = [word for line in self.log().splitlines() for word in line.split()]
        return next(word[4:].strip('"') for word in words if word.startswith("uri=tcp://"))

    @property
    def pid(self) -> int:
        """The backend's pid, not its keeper's."""
        return int((self.run_dir / "lock").read_text() or 0)

    def outlive_quick_death(self) -> None:
        """Wait until another death is not a second quick one, which the keeper would delay."""
        if self._died_quickly:
            time.sleep(max(0.0, self._born + QUICK_DEATH_SECONDS - time.monotonic()))

    def crash(self) -> None:
        """Kill it, and return once its successor answers."""
        self._died_quickly = time.monotonic() < self._born + QUICK_DEATH_SECONDS
        pid = self.pid
        os.kill(pid, signal.SIGKILL)
        self._wait_successor(pid)

    def reload(self) -> None:
        """Reload it, and return once its successor answers."""
        pid = self.pid
        self._processes[-1].send_signal(signal.SIGHUP)
        self._died_quickly = False
        self._wait_successor(pid)

    def takeover(self) -> None:
        """Start a takeover by another process, and return once that answers."""
        pid = self.pid
        self._processes.append(self._start("--takeover"))
        self._wait_successor(pid)

    def _wait_successor(self, pid: int) -> None:
        def is_so() -> bool:
            if self._processes[-1].poll() is not None:
                raise BenchError(f"the keeper ended; its log:\n{self.log()}")
            with contextlib.suppress(ValueError):
                return self.pid not in (0, pid)
            return False

        wait_until("a successor has the run-dir", START_SECONDS, is_so)
        wait_until("it answers", START_SECONDS, lambda: int(self.status()["pid"]) != pid)
        self._born = time.monotonic()
