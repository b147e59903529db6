# SPDX-License-Identifier: Apache-2.0
"""A reload of a backend under systemd: it leaves only for a program that could go on.

Our own keeper checks the installed program before it asks the backend to leave. systemd only
signals the backend, and starts whatever is installed once it has ended; so the backend must check.
"""

from __future__ import annotations

from collections.abc import Callable

from cowshed.cache.errors import UsageError
from cowshed.service.runtime.logs import EventLog
from cowshed.service.runtime.loop import READ, Loop
from cowshed.service.supervise.layouts import ALL_LAYOUTS
from cowshed.service.supervise.reload_check import ReloadCheck

__all__ = ["SupervisedReload"]

_log = EventLog("cowshed")


class SupervisedReload:
    """Checks the program as it is installed now, in the loop; calls on_right if it could go on."""

    def __init__(self, loop: Loop, on_right: Callable[[], None]) -> None:
        self._loop = loop
        self._on_right = on_right
        self._check: ReloadCheck | None = None

    def begin(self) -> None:
        """Begin a check, and cancel an older one."""
        self.close()
        try:
            self._check = ReloadCheck()
        except UsageError as error:
            self._refuse(error)
            return
        self._loop.watch(self._check.fd, READ, self._on_end)
        self._loop.once(self._check.seconds_left, self._on_time)

    def close(self) -> None:
        """Cancel a running check."""
        if self._check is not None:
            self._loop.forget(self._check.fd)
            self._check.cancel()
            self._check = None

    def _on_time(self) -> None:
        if self._check is not None and self._check.is_late():
            self._on_end()

    def _on_end(self, *_: int) -> None:
        check, self._check = self._check, None
        assert check is not None
        self._loop.forget(check.fd)
        try:
            check.end(ALL_LAYOUTS)
        except UsageError as error:
            self._refuse(error)
        else:
            self._on_right()

    def _refuse(self, why: UsageError) -> None:
        _log.error("reload-refused", f"{why}; everything stays as it is")
