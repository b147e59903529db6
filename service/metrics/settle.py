# SPDX-License-Identifier: Apache-2.0
"""Settle guests' charges after scrapes, so that metrics of private pages follow the kernel.

Charges run ahead of copies: a page is charged before it is opened, and some are never written.
Comparing them with the page tables takes too long for a scrape, milliseconds for a guest that wrote
a lot. So it is done afterwards, one guest at a time, and the next scrape shows the result.
"""

from __future__ import annotations

import threading
from typing import Final

from cowshed.service.guests.guests import GuestTable

__all__ = ["Settler"]

# The least pause between two settlings, each of which costs writing guests a few faults.
_PAUSE_SECONDS: Final = 1.0


class Settler:
    """A thread that settles all guests after each ask(), at most once a second."""

    def __init__(self, guests: GuestTable) -> None:
        self._guests = guests
        self._asked = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="settler", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def ask(self) -> None:
        """Request that all guests are settled soon; returns at once."""
        self._asked.set()

    def stop(self) -> None:
        """Stop the thread, after the guest that it is settling."""
        self._stopping.set()
        self._asked.set()
        self._thread.join()

    def _run(self) -> None:
        while self._asked.wait() and not self._stopping.is_set():
            self._asked.clear()
            for guest in self._guests:
                if self._stopping.is_set():
                    return
                self._guests.settle(guest)
            self._stopping.wait(_PAUSE_SECONDS)
