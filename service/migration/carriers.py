# SPDX-License-Identifier: Apache-2.0
"""Guests that carry their private pages along themselves: programs under `cowshed attach`.

Such a program has the pages in its own memory, and several mappings may have different copies of
one page of the image. At a target on the same host it opens each mapping anew and copies the pages
over (transport/preload/moves.c). So the handoff gives the target only a name, a quota and a token:
an overlay without pages, which only a mapping that brings its own can enter. Until the program has
left, it keeps running here, and is not frozen.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Final

from cowshed.accounting.page_runs import PackedRuns
from cowshed.service.guests.guests import Guest
from cowshed.service.migration.migrating import MigratingMapping, counters_of, owner_of_token
from cowshed.service.overlays.claims import CARRIER
from cowshed.transport.handoff.sections import GuestSection

__all__ = ["MigratingCarrier", "carrier_of_token", "may_carry"]

_UNIX: Final = "unix://"


def carrier_of_token(token: str) -> str:
    """Return the owner of the overlay that reserves the place of a carrier with this token."""
    return CARRIER + owner_of_token(token)


def may_carry(guest: Guest, uri: str) -> bool:
    """Whether all of a guest's mappings can move to a target by themselves.

    Each must have announced that it can, be connected, and see the target's socket at the same path
    as this process. The caller must hold the table's lock.
    """
    if not uri.startswith(f"{_UNIX}/") or guest.request.token is None:
        return False
    if not all(each.carries and not each.is_parked for each in guest.mappings):
        return False
    path = uri.removeprefix(_UNIX)
    try:
        ours = os.stat(path)
        theirs = [os.stat(f"/proc/{each.pid}/root{path}") for each in guest.mappings]
    except OSError:
        return False
    return all(os.path.samestat(ours, status) for status in theirs)


class MigratingCarrier(MigratingMapping):
    """A guest that carries its pages along. Only its name, quota and token are sent."""

    def blockers(self) -> list[str]:
        """Return why it cannot move: memory that cannot be served cannot be copied."""
        status = self.guest.status()
        if status is not None and status.broken:
            return [f"its memory cannot be served ({os.strerror(-status.broken)}); end it"]
        return []

    @property
    def is_here(self) -> bool:
        """Whether any of its mappings is still here."""
        return bool(self.guest.mappings)

    def section(self, image_no: int) -> GuestSection:
        """Describe it to the target, owned by the carrier of its token."""
        return replace(super().section(image_no), owner=carrier_of_token(self.token))

    def track(self, on: bool) -> None:
        """Do nothing: the program finds its pages itself."""

    def take_dirty(self) -> int:
        """Return no pages: none are sent."""
        return 0

    def freeze(self) -> None:
        """Do nothing: pages that it writes until it leaves go with it."""

    def thaw(self) -> None:
        """Do nothing."""

    def private(self, *, settles: bool = True) -> int:  # noqa: ARG002
        """Return no pages: none are sent."""
        return 0

    def load(self, runs: PackedRuns, to: memoryview) -> None:  # noqa: ARG002
        """Must not be called: private() is empty."""
        raise AssertionError(f"guest {self.name!r} carries its pages along itself")

    def counters(self) -> dict[str, int]:
        """Return the counters of all its mappings."""
        with self._guests.lock:
            status = self.guest.status()
            return {} if status is None else {**counters_of(status), "private_pages": 0}
