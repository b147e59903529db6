# SPDX-License-Identifier: Apache-2.0
"""Mappings that outlive their connection: parked, until their memory is gone.

A program can close its end of a connection by accident: a loop of bare close(2) calls ends it, and
the program's own userfaultfd with it. Were the mapping let go then, the last userfaultfd would go
too, and every page that is not there would read as zeros, silently. So who leaves without "close"
is served on until its process has ended (which the server notices), has executed another
program, or has nothing of the mapping left.
"""

from __future__ import annotations

from typing import Final

from cowshed.service.guests.guests import Mapping
from cowshed.service.guests.userfaultfd import memory_lives
from cowshed.service.runtime.logs import EventLog

__all__ = ["Parking"]

_log = EventLog("cowshed")

# At a time, in the loop: 2 ms at most.
_LOOKS: Final = 2048


class Parking:
    """One mapping without a connection. is_over() is to be asked now and then, in the loop."""

    def __init__(self, mapping: Mapping) -> None:
        self._mapping = mapping
        self._page = 0
        self._is_logged = False

    def is_over(self) -> bool:
        """Whether nobody can miss the mapping any more.

        A process that ends closes its connection a moment before it has ended, but after its memory
        has gone: so the first answer is right already, and only the second is logged.
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
                "it closed its connection and has the image mapped still: it is served until its "
                "process ends; programs must not close descriptors that are not theirs",
                guest=mapping.name,
                image=mapping.image.label,
                pid=mapping.pid,
                uid=mapping.uid,
            )
        mapping.is_parked = True
        return False
