# SPDX-License-Identifier: Apache-2.0
"""Threads for work that must not block the loop: one for quick reads, some for long orders.

Warming a large image takes minutes; the status, which shows its progress, must not queue behind it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Final

from cowshed.service.runtime.logs import EventLog
from cowshed.transport.messages.fields import error_reply

__all__ = ["Workers"]

_log = EventLog("cowshed.workers")

Body = dict[str, Any]

_NR_ORDERS: Final = 4


def _pool(nr_threads: int, name: str) -> ThreadPoolExecutor:
    """Return a pool with all threads started: later the limit of threads might prevent it."""
    pool = ThreadPoolExecutor(nr_threads, name)
    all_there = threading.Barrier(nr_threads)
    wait([pool.submit(all_there.wait) for _ in range(nr_threads)])
    return pool


class Workers:
    """Runs work in threads and passes its replies to the loop by post; stop() waits for all work.

    post(call) has the loop call call(). stop() ends work between two replies; long work must also
    check is_stopping between two steps.
    """

    def __init__(self, post: Callable[[Callable[[], None]], None]) -> None:
        self._post = post
        self._stopping = False
        self._looks = _pool(1, "looks")
        self._orders = _pool(_NR_ORDERS, "orders")

    def submit(
        self,
        work: Callable[[], Iterator[Body]],
        reply: Callable[[Body], None],
        on_done: Callable[[], None],
        *,
        is_quick: bool,
    ) -> None:
        """Run work in a thread; the loop calls reply for each of its replies, then on_done."""
        pool = self._looks if is_quick else self._orders
        pool.submit(self._run, work, reply, on_done)

    def run(self, call: Callable[[], None]) -> None:
        """Make a quick call in the thread for quick work."""
        self._looks.submit(self._call, call)

    @property
    def is_stopping(self) -> bool:
        """Whether long work must end as soon as it can."""
        return self._stopping

    def stop(self) -> None:
        """Drop work that has not begun, and wait for the rest to end its step."""
        self._stopping = True
        for pool in (self._looks, self._orders):
            pool.shutdown(wait=True, cancel_futures=True)

    def _call(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:  # the pool's future, which has it, is dropped
            _log.crash("call-failed", "a defect of cowshed: please report it")

    def _run(
        self,
        work: Callable[[], Iterator[Body]],
        reply: Callable[[Body], None],
        on_done: Callable[[], None],
    ) -> None:
        try:
            for body in work():
                self._post(lambda body=body: reply(body))  # type: ignore[misc]
                if self._stopping:
                    return
        except Exception as error:
            _log.crash("request-failed", "a defect of cowshed: please report it")
            body = error_reply("peer", f"the daemon failed ({error}); see its log")
            self._post(lambda: reply(body))
        finally:
            self._post(on_done)
