# SPDX-License-Identifier: Apache-2.0
"""The part of the daemon that a session uses."""

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
        """The daemon's configuration."""

    @property
    def control(self) -> Control:
        """The operators' requests."""

    @property
    def guests(self) -> GuestTable:
        """The attached guests."""

    @property
    def guest_records(self) -> GuestRecords:
        """The records of guests that a successor restores."""

    @property
    def incoming(self) -> IncomingGuests:
        """Guests that a drain moved here and that have not mapped yet."""

    @property
    def uffd_device(self) -> int | None:
        """An open /dev/userfaultfd to lend, or None."""

    @property
    def reopener(self) -> Reopener:
        """Opens sources for guests."""

    @property
    def workers(self) -> Workers:
        """Threads for long operations."""

    def end_parked(self, request: OpenRequest) -> bool:
        """End a guest's parked sessions that have nothing mapped; return whether any ended."""

    def shut_down(self) -> None:
        """End the daemon once the replies are sent."""
