# SPDX-License-Identifier: Apache-2.0
"""Listeners that cannot be opened yet: why, and served as soon as they can be.

At a first start a listener that cannot be opened is an error, which ends the daemon with one line.
A successor serves without it instead, for guests wait for everything else, and tries it again here,
in threads that nobody waits for: files of certificates and names of hosts may be far away.
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

# How long all listeners of a successor together may hold up its guests.
_FIRST_SECONDS: Final = 3.0

T = TypeVar("T")


class _Unserved(Generic[T]):
    """A listener that is not served: why, and what is called once it can be.

    Invariant: prepared has what prepare() gave and serve() does not have yet; nothing is put there
    once is_late, which says that nobody waits for it.
    """

    def __init__(self, address: str, prepare: Callable[[], T], serve: Callable[[T], None]) -> None:
        self.address: Final = address
        self.prepare: Final = prepare
        self.serve: Final = serve
        self.why = (
            "it is still being opened; a file of its certificate or the name of its host may be "
            "on something that does not answer"
        )
        self.prepared: list[T] = []
        self.is_late = False
        self.was_tried: Final = threading.Event()


class UnservedListeners:
    """Serves listeners, and tries those again that cannot be.

    For the loop; status() is for any thread.

    Invariant: each address in _unserved is served by nobody.
    """

    def __init__(
        self, listeners: Listeners, loop: Loop, side: SideThreads, *, is_first: bool
    ) -> None:
        """is_first: there was no backend before us, so nobody is lost if we end."""
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
        """Call serve(prepare()): now, or once prepare() no longer raises CowshedError, or returns.

        At a first start prepare is called here, and its error raised. A successor calls it in a
        side thread and waits until _FIRST_SECONDS after its first listener. serve is called here,
        or later in the loop. kept_as is the listener's name to Listeners: what our predecessor had
        there goes on being held, and clients wait in its queue.
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
            f"{each.why}; all else is served, and this as soon as it can be",
            address=address,
        )

    def look(self) -> None:
        """Begin to try each once more."""
        for each in self._listed():
            self._begin(each)

    def status(self) -> list[dict[str, Any]]:
        """What the status tells of each."""
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
