# SPDX-License-Identifier: Apache-2.0
"""What a drain needs of the daemon."""

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
        """Where metrics look."""

    @property
    def record(self) -> HandoffRecord:
        """What outlives us."""

    @property
    def working_sets(self) -> WorkingSets:
        """Which extents are hot."""

    def images(self) -> list[Image]:
        """What is served."""

    def allowed(self, image: Image) -> DomainMembers | None:
        """Who of its domain may use an image; None is everybody there."""

    def migrating(
        self, carry_to: str = "", carried: Container[tuple[str, str]] = ()
    ) -> list[MigratingGuest]:
        """Every guest that there is now; see carriers.py for those that take their pages along."""

    def close_admission(self, uri: str | None) -> None:
        """Send who comes to uri; None: let them in again."""

    def wait_admitted(self) -> None:
        """Wait until the guests that came before admission ended are in migrating()."""

    def connect(
        self, uri: str, look: Callable[[], None], reply_seconds: float = REPLY_SECONDS
    ) -> Link:
        """Reach the target, ready for the first section."""

    def send_on(self, migrating: list[MigratingGuest], uri: str) -> None:
        """End the connections of guests whose pages are ours; they are needed here a while yet."""

    def notify_moved(self, migrating: list[MigratingGuest], uri: str) -> None:
        """Have guests told where they are now, and end connections that cannot be told."""
