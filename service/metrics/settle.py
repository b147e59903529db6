# SPDX-License-Identifier: Apache-2.0
"""Settles guests' charges after scrapes, so that metrics of private pages follow the kernel.

Charges run ahead of copies: a page is charged before it is opened, and some are never written.
Asking the kernel about each takes too long for a scrape, milliseconds for a guest that wrote a lot.
So it is done afterwards, one guest at a time, and the next scrape shows it.
"""

from __future__ import annotations

import threading
from typing import Final

from cowshed.service.guests.guests import GuestTable

__all__ = ["Settler"]

# However often somebody scrapes: settling costs guests that write a fault now and then.
_PAUSE_SECONDS: Final = 1.0


class Settler:
    """A thread that settles all guests whenever it was asked to, at most once a second."""

    def __init__(self, guests: GuestTable) -> None:
        self._guests = guests
        self._asked = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="settler", daemon=True)

    def start(self) -> None:
        """Begin to settle when asked."""
        self._thread.start()

    def ask(self) -> None:
        """Have all guests settled soon; returns at once."""
        self._asked.set()

    def stop(self) -> None:
        """End the thread, after the guest it is at."""
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
