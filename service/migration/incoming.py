# SPDX-License-Identifier: Apache-2.0
"""Guests that moved here and will map: their private pages wait for them in an overlay.

A guest that opens under the name of such an overlay, and knows its token, takes over the name. When
it has a mapping, the overlay's pages are preloaded into it and the overlay is withdrawn. If the
guest leaves before that, the overlay stays as it was.

The name and quota of a program that carries its pages itself (carriers.py) wait in an overlay
without pages. The first of its mappings withdraws that; the others join the guest.
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
    """One guest that is about to map: guest has the name now, left the pages."""

    guest: Guest
    left: OverlayGuest
    carries: bool = False

    @property
    def preload(self) -> tuple[int, bytes] | None:
        """The file with its pages and their bitmap; None if the program carries them."""
        if self.carries:
            return None
        return self.left.overlay.fd, self.left.account.private_bitmap()


class IncomingGuests:
    """Finds the overlays of guests that moved here; in the loop."""

    def __init__(self, overlays: OverlayTable, guests: GuestTable) -> None:
        self._overlays = overlays
        self._guests = guests

    def lacks(self, request: OpenRequest) -> bool:
        """Whether pages of the guest are still missing; then its open must wait.

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
                    "backend it came from, and cannot be mapped: connect without mapping, and "
                    "write them anew"
                )
            return missing.nr_left > 0

    def enter(
        self, request: OpenRequest, peer: GuestProcess
    ) -> tuple[IncomingGuest, OpenRequest] | None:
        """Take over the overlay that waits under that name and token; None if there is none.

        Returns the request with the overlay's quota and policy. UsageError if it is for a part of
        the image: the private pages may be anywhere in it.
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
        """Withdraw the overlay: the guest has its pages."""
        self._overlays.leave(moved.left)
        self._overlays.withdraw(moved.left)

    def leave(self, moved: IncomingGuest) -> None:
        """Note that it left without a mapping, its name released: the overlay keeps waiting."""
        if moved.carries and self._guests.has(moved.left.request.key):
            self.complete(moved)  # another of its mappings was attached meanwhile
            return
        self._guests.reserve_name(moved.left.request)
        self._overlays.leave(moved.left)
