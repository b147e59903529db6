# SPDX-License-Identifier: Apache-2.0
"""The daemon's loop: ready descriptors, calls from other threads, timers.

One thread does everything here that is not a fault; long work goes to workers.
"""

from __future__ import annotations

import contextlib
import os
import queue
import selectors
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

__all__ = ["LEAVE", "READ", "RELOAD", "WRITE", "Loop", "ignore_stop_signals"]

READ: Final = selectors.EVENT_READ
WRITE: Final = selectors.EVENT_WRITE

OnReady = Callable[[int, int], None]

_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
# These end run() too; its caller sees which signal did in Loop.ended_by.
LEAVE: Final = signal.SIGUSR1
RELOAD: Final = signal.SIGHUP


@dataclass
class _Timer:
    seconds: float | None  # None: once
    due: float
    call: Callable[[], object]


class Loop:
    """Watches descriptors for their owners; must be closed, or left as a context manager.

    All methods except call() and stop() are for the loop's own thread, or before run().
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._timers: list[_Timer] = []
        self._muted: dict[int, selectors.SelectorKey] = {}
        self._after_calls: list[Callable[[], None]] = []
        self._stopping = False
        self.ended_by: signal.Signals | None = None
        self._wake_reader, self._wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.watch(self._wake_reader, READ, self._on_wake)
        self._previous_wakeup: int | None = None

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the loop's own descriptors; the watched ones stay their owners'."""
        if self._previous_wakeup is not None:
            signal.set_wakeup_fd(self._previous_wakeup)
        self._selector.close()
        os.close(self._wake_reader)
        os.close(self._wake_writer)

    def watch(self, fd: int, events: int, on_ready: OnReady) -> None:
        """Call on_ready(fd, events) whenever fd is ready for READ, WRITE or both."""
        self._selector.register(fd, events, on_ready)

    def change(self, fd: int, events: int) -> None:
        """Watch a descriptor for other events from now on."""
        if fd in self._muted:
            self._muted[fd] = self._muted[fd]._replace(events=events)
            return
        key = self._selector.get_key(fd)
        if key.events != events:
            self._selector.modify(fd, events, key.data)

    def forget(self, fd: int) -> None:
        """Stop watching a descriptor; to be called before it is closed."""
        if self._muted.pop(fd, None) is None:
            self._selector.unregister(fd)

    def mute(self, fd: int) -> None:
        """Suspend the watch of a descriptor, if there is one, until unmute_all()."""
        if fd in self._selector.get_map():
            self._muted[fd] = self._selector.unregister(fd)

    def unmute_all(self) -> None:
        """Resume the watch of all muted descriptors."""
        for fd, key in self._muted.items():
            self._selector.register(fd, key.events, key.data)
        self._muted.clear()

    def every(self, seconds: float, call: Callable[[], object]) -> None:
        """Make a call repeatedly, at least that many seconds apart."""
        self._timers.append(_Timer(seconds, time.monotonic() + seconds, call))

    def once(self, seconds: float, call: Callable[[], None]) -> None:
        """Make a call once, at least that many seconds from now."""
        self._timers.append(_Timer(None, time.monotonic() + seconds, call))

    def after_calls(self, call: Callable[[], None]) -> None:
        """Make a call each time after the calls from other threads were made."""
        self._after_calls.append(call)

    def call(self, call: Callable[[], None]) -> None:
        """Have the loop make a call; from any thread."""
        self._calls.put(call)
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_writer, b"x")

    def stop(self) -> None:
        """End run() after the calls queued before; from any thread."""
        self.call(self._stop)

    def _stop(self) -> None:
        self._stopping = True

    def leave(self) -> None:
        """End run() as LEAVE does; in the loop's thread."""
        self.ended_by = LEAVE
        self._stop()

    def begin_again(self) -> None:
        """Undo the end of run(), which may then be called again."""
        self.ended_by = None
        self._stopping = False

    def stop_on_signals(self, *, reload: bool = False) -> None:
        """Let SIGTERM, SIGINT, LEAVE and, if reload, RELOAD end run(), or keep it from starting."""
        self._previous_wakeup = signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)
        for number in (*_STOP_SIGNALS, LEAVE, *([RELOAD] if reload else [])):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: object) -> None:
        self.ended_by = signal.Signals(number)
        self._stop()

    def run(self) -> None:
        """Serve until stop(), or a signal after stop_on_signals()."""
        while not self._stopping:
            for key, events in self._selector.select(self._seconds_left()):
                # An earlier callback of this round may have closed it.
                now = self._selector.get_map().get(key.fd)
                if now is not None and now.data is key.data:
                    key.data(key.fd, events)
            self._look_at_clock()

    def _seconds_left(self) -> float | None:
        if not self._timers:
            return None
        return max(0.0, min(timer.due for timer in self._timers) - time.monotonic())

    def _look_at_clock(self) -> None:
        for timer in list(self._timers):
            now = time.monotonic()
            if now < timer.due:
                continue
            if timer.seconds is None:
                self._timers.remove(timer)
            else:
                timer.due = now + timer.seconds
            timer.call()

    def _on_wake(self, fd: int, _: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(fd, 4096)
        while True:
            try:
                call = self._calls.get_nowait()
            except queue.Empty:
                break
            call()
        for after in self._after_calls:
            after()


def ignore_stop_signals() -> None:
    """Ignore SIGTERM and SIGINT at the very end of the process.

    Python restores the default handlers there, and a second signal would kill.
    """
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
