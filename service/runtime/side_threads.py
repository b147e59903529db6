# SPDX-License-Identifier: Apache-2.0
"""Calls that may hang in a file system, made in threads that the process does not wait for.

A call into a hung file system cannot be ended. So each call has a key, an image's for example, and
each key one call at a time: at most as many threads hang as there are keys. The process exits
without waiting for them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from cowshed.service.runtime.logs import EventLog

__all__ = ["InTime", "SideThreads"]

_log = EventLog("cowshed.workers")

_IDLE_SECONDS: Final = 5.0

T = TypeVar("T")


class SideThreads:
    """Makes calls, one at a time for each key. For any thread.

    Invariants: _began has the keys of the calls that were accepted and have not ended; each has a
    thread, or one about to take it. _idle has the conditions of the threads without a call, the
    longest idle first; the last gets the next call, so that the others time out and end.
    """

    def __init__(self, idle_seconds: float = _IDLE_SECONDS) -> None:
        """A thread that had no call for idle_seconds ends."""
        self._idle_seconds: Final = idle_seconds
        self._lock: Final = threading.Lock()
        self._began: dict[str, float] = {}
        self._queue: deque[tuple[str, Callable[[], None]]] = deque()
        self._idle: list[threading.Condition] = []
        self._ended: Final = threading.Condition(self._lock)

    def run(self, key: str, call: Callable[[], None]) -> bool:
        """Have a call made; False, and it is not, while the key's last call has not ended.

        False too if no thread can be started for it.
        """
        with self._lock:
            if key in self._began:
                return False
            self._began[key] = time.monotonic()
            self._queue.append((key, call))
            if self._idle:
                self._idle.pop().notify()
                return True
        try:
            threading.Thread(target=self._run, name="side", daemon=True).start()
        except RuntimeError:  # at the limit of threads
            with self._lock:
                if (key, call) in self._queue:
                    self._queue.remove((key, call))
                    del self._began[key]
                    return False
        return True

    def waiting_seconds(self, key: str) -> float:
        """Return how long a key's call has been running; 0.0 if none is."""
        with self._lock:
            began = self._began.get(key)
        return 0.0 if began is None else time.monotonic() - began

    def wait_all(self, seconds: float) -> bool:
        """Wait until no call is running; False if that takes longer."""
        with self._ended:
            return self._ended.wait_for(lambda: not self._began, seconds)

    def _run(self) -> None:
        called = threading.Condition(self._lock)
        while True:
            with self._lock:
                while not self._queue:
                    self._idle.append(called)
                    called.wait(self._idle_seconds)
                    if called in self._idle:
                        self._idle.remove(called)
                        return
                key, call = self._queue.popleft()
            try:
                call()
            except Exception:
                _log.crash("side-call-failed", "a defect of cowshed: please report it", key=key)
            finally:
                with self._lock:
                    del self._began[key]
                    self._ended.notify_all()


class InTime(Generic[T]):
    """One call, started at once in its own thread; the caller waits only as long as it wants.

    A result that comes after give_up() goes to on_late, in that thread.
    """

    def __init__(
        self, call: Callable[[], T], on_late: Callable[[T], None] = lambda _: None
    ) -> None:
        self._lock: Final = threading.Lock()
        self._ended: Final = threading.Event()
        self._on_late: Final = on_late
        self._call: Final = call
        self._is_given_up = False
        self._value: T
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name="in-time", daemon=True).start()

    def wait(self, seconds: float) -> bool:
        """Wait for the call; whether it ended within that time."""
        return self._ended.wait(seconds)

    def result(self) -> T:
        """Return the result of the ended call, or raise its error."""
        if self._error is not None:
            raise self._error
        return self._value

    def give_up(self) -> bool:
        """Abandon the call; False if it ended just now, and the caller must take result()."""
        with self._lock:
            self._is_given_up = not self._ended.is_set()
            return self._is_given_up

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error
        with self._lock:
            if not self._is_given_up:
                self._ended.set()
                return
        if self._error is None:
            self._on_late(self._value)
