# SPDX-License-Identifier: Apache-2.0
"""Which exports an NBD client sees, by the names it may ask for.

IMAGE, DOMAIN/IMAGE               an image, read-only
IMAGE@GUEST, DOMAIN/IMAGE@GUEST   a guest's private copy of it: its overlay
"" (the default export)           the image, read-only, if the client may use just one
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cowshed.cache import Image, PageStore
from cowshed.cache.errors import CapacityError, CowshedError, UsageError
from cowshed.service.frontends.nbd.peers import NbdPeer
from cowshed.service.images.access import Access
from cowshed.service.overlays.claims import NotYoursError
from cowshed.service.overlays.entrance import Entering, Entrance, NotYetError
from cowshed.service.overlays.overlays import OverlayGuest, OverlayTable
from cowshed.transport.nbd.negotiation import Export, ExportPending, ExportRefused
from cowshed.transport.nbd.wire import Reply

__all__ = ["EnteredExport", "NbdDirectory", "split_export"]


@dataclass(frozen=True)
class EnteredExport(Export):
    """An export that a client may enter; overlay is set once the client has entered a guest's."""

    image: Image | None = None
    overlay: OverlayGuest | None = None


def split_export(name: str) -> tuple[str, str]:
    """Split IMAGE@GUEST; the guest is "" for an image. UsageError for an invalid guest name."""
    image, at, guest = name.partition("@")
    if at and not (0 < len(guest) <= 64 and guest.isprintable()):
        raise UsageError(
            f"export {name[:140]!r} names no guest: "
            "write IMAGE@GUEST, with 1 to 64 printable characters after the '@'"
        )
    return image, guest


class NbdDirectory:
    """The exports of one client. Raises ExportRefused, as transport/nbd/negotiation.py defines."""

    def __init__(
        self,
        store: PageStore,
        access: Access,
        overlays: OverlayTable,
        entrance: Entrance,
        peer: NbdPeer,
        client: Entering,
    ) -> None:
        self._store = store
        self._access = access
        self._overlays = overlays
        self._entrance = entrance
        self._peer = peer
        self._client = client

    def exports(self) -> Iterator[Export]:
        """Every image the client may use, and the overlays it may return to."""
        for image in self._access.usable(self._store, self._peer.identity):
            yield self._describe(image, "")
            for guest in self._overlays.names(image, self._peer.claim):
                yield self._describe(image, guest)

    def find(self, name: str) -> Export:
        """Describe an export; its overlay need not exist yet."""
        try:
            image, guest = self._look(name)
            if guest:
                self._entrance.check(image, guest, self._peer.claim)
        except CowshedError as error:
            raise _refused(error) from error
        return self._describe(image, guest)

    def enter(self, name: str) -> EnteredExport:
        """Describe an export and enter it: its overlay exists afterwards and counts this client."""
        try:
            image, guest = self._look(name)
            overlay = (
                self._entrance.enter(self._client, image, guest, self._peer.claim)
                if guest
                else None
            )
        except NotYetError as error:
            raise ExportPending from error
        except CowshedError as error:
            raise _refused(error) from error
        return self._describe(image, guest, overlay)

    def _look(self, name: str) -> tuple[Image, str]:
        image_name, guest = split_export(name)
        identity = self._peer.identity
        if not name:
            self._access.check_open()
            usable = self._access.usable(self._store, identity)
            if len(usable) != 1:
                raise UsageError("there is no default export: name one of the exports")
            return usable[0], ""
        return self._access.find(self._store, image_name, identity), guest

    def _describe(
        self, image: Image, guest: str, overlay: OverlayGuest | None = None
    ) -> EnteredExport:
        return EnteredExport(
            name=f"{image.label}@{guest}" if guest else image.label,
            description=f"private copy of {image.name}" if guest else "read-only image",
            size_bytes=image.size_bytes,
            read_only=not guest,
            preferred_bytes=image.extent_bytes,
            image=image,
            overlay=overlay,
        )


def _refused(error: CowshedError) -> ExportRefused:
    if isinstance(error, NotYoursError):
        return ExportRefused(Reply.ERR_POLICY, str(error))
    if isinstance(error, UsageError):
        return ExportRefused(Reply.ERR_UNKNOWN, str(error))
    if isinstance(error, CapacityError):
        return ExportRefused(Reply.ERR_POLICY, str(error))
    return ExportRefused(Reply.ERR_PLATFORM, str(error))
