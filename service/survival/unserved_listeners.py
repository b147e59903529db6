# SPDX-License-Identifier: Apache-2.0
"""Listeners that cannot be opened yet: why, and served as soon as they can be.

At a first start a listener that cannot be opened is an error, which ends the daemon with one line.
A successor serves without it instead, for guests wait for everything else, and tries it again here,
in threads that nobody waits for: files of certificates and names of hosts may be far away.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from cowshed.cache.errors import CowshedError
from cowshed.service.runtime.logs import EventLog
from cowshed.service.runtime.loop import Loop
from cowshed.service.runtime.side_threads import SideThreads
from cowshed.service.survival.listeners import Listeners

__all__ = ["UnservedListeners"]

_log = EventLog("cowshed.listeners")

T = TypeVar("T")


@dataclass(eq=False)
class _Unserved:
    """A listener that is not served. begin() has the loop serve it, or raises CowshedError."""

    address: str
    begin: Callable[[], None]
    why: str


class UnservedListeners:
    """Serves listeners, and tries those again that cannot be.

    For the loop; status() is for any thread.

    Invariant: each address in _unserved is served by nobody, and its begin() has not succeeded.
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
        self._unserved: Final[list[_Unserved]] = []

    def serve(
        self, address: str, prepare: Callable[[], T], serve: Callable[[T], None], held_as: str
    ) -> None:
        """Call serve(prepare()): now, or once prepare() no longer raises CowshedError.

        prepare is called here first, later in a side thread; serve here or in the loop. held_as is
        the listener's name to Listeners: what our predecessor had there goes on being held, and
        clients wait in its queue. At a first start prepare's error is raised.
        """
        try:
            prepared = prepare()
        except CowshedError as error:
            if self._is_first:
                raise
            self._listeners.keep(held_as)
            _log.error(
                "listener-unserved",
                f"{error}; all else is served, and this as soon as it can be",
                address=address,
            )

            def begin() -> None:
                late = prepare()
                self._loop.call(lambda: serve(late))

            self._unserved.append(_Unserved(address, begin, str(error)))
        else:
            serve(prepared)

    def look(self) -> None:
        """Begin to try each once more."""
        for each in self._listed():
            self._side.run(f"listen {each.address}", lambda each=each: self._try(each))  # type: ignore[misc]

    def status(self) -> list[dict[str, Any]]:
        """What the status tells of each."""
        return [{"address": each.address, "why": each.why} for each in self._listed()]

    def _listed(self) -> list[_Unserved]:
        with self._lock:
            return list(self._unserved)

    def _try(self, each: _Unserved) -> None:
        with self._lock:
            if each not in self._unserved:
                return  # served by the try before
        try:
            each.begin()
        except CowshedError as error:
            each.why = str(error)
            return
        _log.notice("listener-served", "it can be opened now", address=each.address)
        with self._lock:
            self._unserved.remove(each)
