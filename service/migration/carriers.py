# SPDX-License-Identifier: Apache-2.0
"""Guests that take their private pages along themselves: programs under `cowshed attach`.

Such a program has the pages in its own memory, perhaps several of one page of the image, in as many
mappings. To a target on the same host it opens each mapping anew and copies the pages over
(transport/preload/moves.c). So the handoff gives the target a name, a quota and a token only: an
overlay without pages, which nobody can enter but a mapping that brings its own. Until the program
has left, it goes on here as before, and is not frozen.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Final

from cowshed.service.guests.guests import Guest
from cowshed.service.migration.migrating import MigratingMapping, Runs, counters_of, owner_of_token
from cowshed.service.overlays.claims import CARRIER
from cowshed.transport.handoff.sections import GuestSection

__all__ = ["MigratingCarrier", "carrier_of_token", "may_carry"]

_UNIX: Final = "unix://"


def carrier_of_token(token: str) -> str:
    """Give the owner of the overlay that holds a place for who brings its pages and this token."""
    return CARRIER + owner_of_token(token)


def may_carry(guest: Guest, uri: str) -> bool:
    """Whether all of a guest's mappings can follow it to a target by themselves.

    That is so if each said that it would, has its connection, and finds the target's socket, where
    this process finds it, at the same path. With the table's lock.
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
    """A guest that takes its pages along. Nothing of it is sent but who it is."""

    def blockers(self) -> list[str]:
        """A mapping that cannot be served cannot be left either."""
        status = self.guest.status()
        if status is not None and status.broken:
            return [f"its memory cannot be served ({os.strerror(-status.broken)}); end it"]
        return []

    @property
    def is_here(self) -> bool:
        """Whether any of its mappings has not left yet."""
        return bool(self.guest.mappings)

    def section(self, image_no: int) -> GuestSection:
        """Its place is kept for who brings pages along."""
        return replace(super().section(image_no), owner=carrier_of_token(self.token))

    def track(self, on: bool) -> None:
        """Nothing to do: the program looks at its pages itself."""

    def take_dirty(self) -> int:
        """Nothing is sent."""
        return 0

    def freeze(self) -> None:
        """Nothing to do: what it writes until it leaves goes with it."""

    def thaw(self) -> None:
        """Nothing to do."""

    def private(self) -> int:
        """None that the target is given."""
        return 0

    def load(self, runs: Runs) -> bytes:  # noqa: ARG002
        """Never asked for, as there is nothing private."""
        raise AssertionError(f"pages of guest {self.name!r} are its own to take along")

    def counters(self) -> dict[str, int]:
        """What was counted of all its mappings."""
        with self._guests.lock:
            status = self.guest.status()
            return {} if status is None else {**counters_of(status), "private_pages": 0}
