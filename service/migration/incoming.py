# SPDX-License-Identifier: Apache-2.0
"""Guests that moved here and come to map: their private pages are waiting for them in an overlay.

A guest that opens under the name of such an overlay, and knows its token, takes the name over. When
its mapping is there, the overlay's pages are preloaded into it and the overlay is given up. A guest
that leaves before that leaves the overlay as it was.

A program that brings its pages along itself (carriers.py) finds its name and its quota in an
overlay without pages. The first of its mappings gives that up; the others join the guest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cowshed.accounting import MissingPages
from cowshed.cache import UsageError
from cowshed.service.guests.guests import Guest, GuestProcess, GuestTable, OpenRequest
from cowshed.service.migration.carriers import carrier_of_token
from cowshed.service.migration.migrating import owner_of_token
from cowshed.service.overlays.overlays import OverlayGuest, OverlayTable

__all__ = ["IncomingGuest", "IncomingGuests"]


@dataclass
class IncomingGuest:
    """One guest that is coming to map: guest has the name now, left its pages."""

    guest: Guest
    left: OverlayGuest
    carries: bool = False

    @property
    def preload(self) -> tuple[int, bytes] | None:
        """The file with its pages, and which those are; None if it brings them along."""
        if self.carries:
            return None
        return self.left.overlay.fd, self.left.account.private_bitmap()


class IncomingGuests:
    """Finds guests that moved here; in the loop."""

    def __init__(self, overlays: OverlayTable, guests: GuestTable) -> None:
        self._overlays = overlays
        self._guests = guests

    def lacks(self, request: OpenRequest) -> bool:
        """Whether pages are still on their way of who is to enter, which must wait for them.

        UsageError if some of them are lost.
        """
        if request.token is None:
            return False
        with self._overlays.lock:
            left = self._overlays.get(*request.key)
            if left is None or left.owner != owner_of_token(request.token):
                return False
            missing = MissingPages(left.overlay)
            if missing.nr_lost:
                raise UsageError(
                    f"{missing.nr_lost} private pages of guest {request.name!r} were lost with the "
                    "backend it came from, and cannot be mapped: open it by bytes, and write "
                    "them anew"
                )
            return missing.nr_left > 0

    def enter(
        self, request: OpenRequest, peer: GuestProcess
    ) -> tuple[IncomingGuest, OpenRequest] | None:
        """Take over the overlay that waits under that name and token; None if there is none.

        The request returned has the overlay's quota and policy. UsageError for a part of the image:
        the guest had the whole.
        """
        if request.token is None:
            return None
        with self._overlays.lock, self._guests.lock:
            owner = (carrier_of_token if request.carries else owner_of_token)(request.token)
            left = self._overlays.claim(request.key, request.image, owner)
            if left is None:
                return None
            if not request.carries and request.length_bytes != request.image.map_bytes:
                self._overlays.leave(left)
                raise UsageError(
                    f"guest {request.name!r} has private pages all over {request.image.label!r}: "
                    "open the whole image"
                )
            policy = left.quota.status().policy
            request = replace(request, quota_bytes=left.quota_bytes, policy=policy)
            self._guests.release_name(left.request)
            return IncomingGuest(
                self._guests.reserve(request, peer), left, request.carries
            ), request

    def complete(self, moved: IncomingGuest) -> None:
        """It has its pages: the overlay is not needed any more."""
        self._overlays.leave(moved.left)
        self._overlays.withdraw(moved.left)

    def leave(self, moved: IncomingGuest) -> None:
        """It left without a mapping, and its name was released: its pages wait on."""
        if moved.carries and self._guests.has(moved.left.request.key):
            self.complete(moved)  # other mappings of it have come meanwhile
            return
        self._guests.reserve_name(moved.left.request)
        self._overlays.leave(moved.left)
