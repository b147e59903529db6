# SPDX-License-Identifier: Apache-2.0
"""Mappings that outlive their connection: parked, until their memory is gone.

A program can close its connection by accident: a loop of bare close(2) calls closes it, and the
program's own userfaultfd too. If the backend detached the mapping then, it would close the last
userfaultfd, and every absent page would silently read as zeros. So a mapping whose connection ends
without "close" is served until its process has ended (which the server notices), has executed
another program, or has unmapped all of it.
"""

from __future__ import annotations

from typing import Final

from cowshed.service.guests.guests import Mapping
from cowshed.service.guests.userfaultfd import memory_lives
from cowshed.service.runtime.logs import EventLog

__all__ = ["Parking"]

_log = EventLog("cowshed")

# Pages looked at by one call, in the loop: takes 2 ms at most.
_LOOKS: Final = 2048


class Parking:
    """One mapping without a connection. The owner must poll is_over(), in the loop."""

    def __init__(self, mapping: Mapping) -> None:
        self._mapping = mapping
        self._page = 0
        self._is_logged = False

    def is_over(self) -> bool:
        """Whether no process has the mapping any more.

        A process that ends closes its connection a moment before it has ended, but after its memory
        is gone. So the first answer is already right, and the parking is logged by the second call.
        """
        mapping = self._mapping
        if not memory_lives(mapping.fds[2]):
            return True
        self._page, found = mapping.account.find_present(self._page, _LOOKS)
        if found is False:
            return True
        if mapping.is_parked and not self._is_logged:
            self._is_logged = True
            _log.warning(
                "parked",
                "it closed its connection and still has the image mapped: it is served until its "
                "process ends; programs must not close descriptors that are not theirs",
                guest=mapping.name,
                image=mapping.image.label,
                pid=mapping.pid,
                uid=mapping.uid,
            )
        mapping.is_parked = True
        return False
