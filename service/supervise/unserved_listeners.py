# SPDX-License-Identifier: Apache-2.0
"""Listeners that cannot be opened yet; each is served as soon as it can be.

At a first start a listener that cannot be opened is an error that ends the daemon with one line. A
successor serves without it instead, since guests wait for everything else, and tries it again here,
in threads that it does not wait for: certificate files and name servers may not answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from cowshed.cache.errors import CowshedError
from cowshed.service.persist.listeners import Listeners
from cowshed.service.runtime.logs import EventLog
from cowshed.service.runtime.loop import Loop
from cowshed.service.runtime.side_threads import SideThreads

__all__ = ["UnservedListeners"]

_log = EventLog("cowshed.listeners")

# How long all listeners of a successor together may delay its guests.
_FIRST_SECONDS: Final = 3.0

T = TypeVar("T")


class _Unserved(Generic[T]):
    """A listener that is not served, why, and the calls that open and serve it.

    Invariant: prepared has the result of prepare() that serve() has not got yet; nothing is put
    there once is_late, when the start no longer waits for it.
    """

    def __init__(self, address: str, prepare: Callable[[], T], serve: Callable[[T], None]) -> None:
        self.address: Final = address
        self.prepare: Final = prepare
        self.serve: Final = serve
        self.why = (
            "it is still being opened; the disk of its certificate's files or the name server of "
            "its host may be something that does not answer"
        )
        self.prepared: list[T] = []
        self.is_late = False
        self.was_tried: Final = threading.Event()


class UnservedListeners:
    """Serves listeners, and retries those that cannot be opened.

    For the loop's thread; status() is for any thread.

    Invariant: no address in _unserved is served.
    """

    def __init__(
        self, listeners: Listeners, loop: Loop, side: SideThreads, *, is_first: bool
    ) -> None:
        """is_first: there was no backend before this one, so its end would lose no guest."""
        self._listeners: Final = listeners
        self._loop: Final = loop
        self._side: Final = side
        self._is_first: Final = is_first
        self._lock: Final = threading.Lock()
        self._unserved: Final[list[_Unserved[Any]]] = []
        self._deadline: float | None = None

    def serve(
        self, address: str, prepare: Callable[[], T], serve: Callable[[T], None], kept_as: str
    ) -> None:
        """Call serve(prepare()) now, or later once prepare() succeeds.

        At a first start prepare is called here, and its error raised. A successor calls it in a
        side thread and waits for it, until _FIRST_SECONDS after the first listener. serve is called
        here, or later in the loop. kept_as is the listener's name in Listeners: the inherited
        socket stays held, and clients wait in its backlog.
        """
        if self._is_first:
            serve(prepare())
            return
        each = _Unserved(address, prepare, serve)
        with self._lock:
            self._unserved.append(each)
        if self._deadline is None:
            self._deadline = time.monotonic() + _FIRST_SECONDS
        if self._begin(each):
            each.was_tried.wait(max(0.0, self._deadline - time.monotonic()))
        with self._lock:
            each.is_late = True
            if each.prepared:
                self._unserved.remove(each)
        if each.prepared:
            serve(each.prepared.pop())
            return
        self._listeners.keep(kept_as)
        _log.error(
            "listener-unserved",
            f"{each.why}; all else is served, and this listener as soon as it can be opened",
            address=address,
        )

    def look(self) -> None:
        """Begin to retry each."""
        for each in self._listed():
            self._begin(each)

    def status(self) -> list[dict[str, Any]]:
        """Return the status's entry of each."""
        return [{"address": each.address, "why": each.why} for each in self._listed()]

    def _listed(self) -> list[_Unserved[Any]]:
        with self._lock:
            return list(self._unserved)

    def _begin(self, each: _Unserved[Any]) -> bool:
        return self._side.run(f"listen {each.address}", lambda: self._try(each))

    def _try(self, each: _Unserved[Any]) -> None:
        with self._lock:
            if each not in self._unserved:
                return  # served by the try before
        try:
            prepared = each.prepare()
        except CowshedError as error:
            each.why = str(error)
            each.was_tried.set()
            return
        with self._lock:
            if not each.is_late:
                each.prepared.append(prepared)
                each.was_tried.set()
                return
            self._unserved.remove(each)
        _log.notice("listener-served", "it can be opened now", address=each.address)
        self._loop.call(lambda: each.serve(prepared))
