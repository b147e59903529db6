# SPDX-License-Identifier: Apache-2.0
"""The part of the daemon that a drain uses."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Protocol

from cowshed.cache import Image
from cowshed.service.images.working_sets import WorkingSets
from cowshed.service.metrics.service_counters import ServiceCounters
from cowshed.service.migration.dial import REPLY_SECONDS
from cowshed.service.migration.link import Link
from cowshed.service.migration.migrating import MigratingGuest
from cowshed.service.migration.record import HandoffRecord
from cowshed.service.settings.domains import DomainMembers

__all__ = ["DrainHost"]


class DrainHost(Protocol):
    """The daemon, as a drain sees it. Its thread-safe parts are used from the drain's thread."""

    @property
    def counters(self) -> ServiceCounters:
        """The counters for metrics."""

    @property
    def record(self) -> HandoffRecord:
        """The record of handoffs, which outlives this process."""

    @property
    def working_sets(self) -> WorkingSets:
        """The recorded working sets."""

    def images(self) -> list[Image]:
        """Return the images served."""

    def allowed(self, image: Image) -> DomainMembers | None:
        """Return who of its domain may use an image; None: all of the domain."""

    def migrating(
        self, carry_to: str = "", carried: Container[tuple[str, str]] = ()
    ) -> list[MigratingGuest]:
        """Return every guest there is now; see carriers.py for those that carry their pages."""

    def close_admission(self, uri: str | None) -> None:
        """Redirect new guests to uri; None: admit them again."""

    def wait_admitted(self) -> None:
        """Wait until all guests admitted before admission closed are in migrating()."""

    def connect(
        self, uri: str, look: Callable[[], None], reply_seconds: float = REPLY_SECONDS
    ) -> Link:
        """Connect to the target; the link is ready for the first section."""

    def send_on(self, migrating: list[MigratingGuest], uri: str) -> None:
        """End the connections of overlays' clients; the overlays are still needed here."""

    def notify_moved(self, migrating: list[MigratingGuest], uri: str) -> None:
        """Notify guests that map of their new place, and end the connections of all others."""
