# SPDX-License-Identifier: Apache-2.0
"""What a session needs of the daemon."""

from __future__ import annotations

from typing import Protocol

from cowshed.service.guests.guest_records import GuestRecords
from cowshed.service.guests.guests import GuestTable, OpenRequest
from cowshed.service.images.reopening import Reopener
from cowshed.service.migration.incoming import IncomingGuests
from cowshed.service.operators.control import Control
from cowshed.service.runtime.workers import Workers
from cowshed.service.settings.config import Config

__all__ = ["SessionHost"]


class SessionHost(Protocol):
    """The daemon, as a session sees it."""

    @property
    def config(self) -> Config:
        """What the daemon was told."""

    @property
    def control(self) -> Control:
        """What operators may ask."""

    @property
    def guests(self) -> GuestTable:
        """Who is attached."""

    @property
    def guest_records(self) -> GuestRecords:
        """What is to outlive us."""

    @property
    def incoming(self) -> IncomingGuests:
        """Guests that moved here, and come to map."""

    @property
    def uffd_device(self) -> int | None:
        """An open /dev/userfaultfd to lend, or None."""

    @property
    def reopener(self) -> Reopener:
        """Who opens sources for guests."""

    @property
    def workers(self) -> Workers:
        """Threads for what takes long."""

    def end_parked(self, request: OpenRequest) -> bool:
        """End what is parked under a name and has nothing mapped any more; whether any was."""

    def shut_down(self) -> None:
        """End the daemon once the replies are out."""
