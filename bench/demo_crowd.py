# SPDX-License-Identifier: Apache-2.0
"""The demo's processes: the backend, and guests that work in lockstep.

An order goes to every guest, and the next one when each has answered. A guest that ends, fails or
sends nothing is a DemoError, with its or the backend's last output. All are children in process
groups of their own: Ctrl-C reaches this process alone, which then ends them.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from demo_stage import DemoError

__all__ = ["Backend", "Crowd"]

_GUEST: Final = Path(__file__).with_name("demo_guest.py")
_READY_SECONDS: Final = 30.0
_SILENCE_SECONDS: Final = 60.0
_TICK_SECONDS: Final = 0.5
_STOP_SECONDS: Final = 10.0
_PR_SET_PDEATHSIG: Final = 1
# Looked up now, so that little happens between fork and exec.
_prctl: Final = ctypes.CDLL(None).prctl


def _die_with_parent() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


class Backend:
    """A `cowshed serve` that ends with the block; its log goes to a file in run_dir."""

    def __init__(self, image: Path, capacity_bytes: int, run_dir: Path) -> None:
        self.uri: Final = f"unix://{run_dir}/cowshed.sock"
        self._log_path = run_dir / "log"
        command = [sys.executable, "-m", "cowshed.service.cli", "serve", "--run-dir", str(run_dir)]
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--image", f"demo={image}", "--capacity", str(capacity_bytes)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
                preexec_fn=_die_with_parent,
            )
        self.pid: Final = self.process.pid

    def __enter__(self) -> Backend:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_ready(self) -> None:
        """Wait until it listens."""
        deadline = time.monotonic() + _READY_SECONDS
        pidfd = os.pidfd_open(self.process.pid)
        try:
            while b"event=serving " not in self._log_path.read_bytes():
                ended, _, _ = select.select([pidfd], [], [], 0.02)
                if ended or time.monotonic() > deadline:
                    how = "ended" if ended else f"is not ready after {_READY_SECONDS:.0f} s"
                    raise DemoError(f"the backend {how}; {self.last_words()}")
        finally:
            os.close(pidfd)

    def last_words(self) -> str:
        """Return the end of its log."""
        lines = self._log_path.read_text(errors="replace").splitlines()
        return "its log ends:\n  " + "\n  ".join(lines[-5:]) if lines else "its log is empty"

    def stop(self) -> None:
        """Stop it by SIGTERM, and by SIGKILL if that takes too long."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Crowd:
    """The guest processes; start() them inside `with`, which kills those that are left."""

    def __init__(self, backend: Backend, log_path: Path) -> None:
        self._backend = backend
        self._log_path = log_path
        self._guests: list[subprocess.Popen[bytes]] = []
        self._ending = False

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        for guest in self._guests:
            guest.kill()
        for guest in self._guests:
            with contextlib.suppress(OSError):
                guest.communicate()

    @property
    def pids(self) -> list[int]:
        """The guests' process ids."""
        return [guest.pid for guest in self._guests]

    def start(self, nr_guests: int, terms: dict[str, Any], image_fd: int) -> None:
        """Start the guests, each with image_fd as its "file"; gather() waits for them."""
        with self._log_path.open("wb") as log:
            for number in range(nr_guests):
                mine = {**terms, "number": number, "file": image_fd}
                self._guests.append(
                    subprocess.Popen(
                        [sys.executable, str(_GUEST), json.dumps(mine)],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        pass_fds=[image_fd],
                        process_group=0,
                    )
                )

    def order(self, order: str) -> None:
        """Send an order to all guests."""
        self._ending = order == "end"
        for guest in self._guests:
            assert guest.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # gather() finds out why
                guest.stdin.write(order.encode() + b"\n")
                guest.stdin.flush()

    def gather(
        self,
        on_progress: Callable[[int], None] = lambda _: None,
        on_tick: Callable[[], object] = lambda: None,
    ) -> list[dict[str, Any]]:
        """Wait until every guest has executed its order; return their answers, by guest.

        on_progress gets the bytes done by any of them; on_tick is called twice a second.
        """
        answers: dict[int, dict[str, Any]] = {}
        next_tick = time.monotonic() + _TICK_SECONDS
        deadline = time.monotonic() + _SILENCE_SECONDS
        with selectors.DefaultSelector() as selector:
            for number, guest in enumerate(self._guests):
                assert guest.stdout is not None
                selector.register(guest.stdout, selectors.EVENT_READ, (number, bytearray()))
            while len(answers) < len(self._guests):
                for key, _ in selector.select(max(0.0, next_tick - time.monotonic())):
                    number, pending = key.data
                    if self._ending and number in answers:
                        selector.unregister(key.fd)
                        continue
                    deadline = time.monotonic() + _SILENCE_SECONDS
                    for message in self._messages(number, key.fd, pending):
                        if "progress" in message:
                            on_progress(message["progress"])
                        else:
                            answers[number] = message["done"]
                now = time.monotonic()
                if now > deadline:
                    silent = next(no for no in range(len(self._guests)) if no not in answers)
                    raise DemoError(
                        f"guest {silent + 1} sent nothing for {_SILENCE_SECONDS:.0f} s; "
                        f"the backend: {self._backend.last_words()}"
                    )
                if now >= next_tick:
                    next_tick = now + _TICK_SECONDS
                    if self._backend.process.poll() is not None:
                        raise DemoError(f"the backend ended; {self._backend.last_words()}")
                    on_tick()
        return [answers[number] for number in range(len(self._guests))]

    def _messages(self, number: int, fd: int, pending: bytearray) -> Iterator[dict[str, Any]]:
        """Read a guest's messages; keeps an unfinished line in pending."""
        data = os.read(fd, 65536)
        if not data:
            status = self._guests[number].wait()
            how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
            words = self._log_path.read_text(errors="replace").strip().splitlines()[-1:]
            raise DemoError(": ".join([f"guest {number + 1} ended {how}", *words]))
        pending += data
        *lines, rest = bytes(pending).split(b"\n")
        pending[:] = rest
        for line in lines:
            message = json.loads(line)
            if "error" in message:
                raise DemoError(f"guest {number + 1}: {message['error']}")
            yield message
