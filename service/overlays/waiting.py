# SPDX-License-Identifier: Apache-2.0
"""Overlays in files that wait for their image's digest, because the source's mtime differs.

The digest is computed in the background and may take minutes, so clients do not wait for it: they
are refused and may retry. The names of such overlays are reserved meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cowshed.accounting import QuotaPolicy
from cowshed.cache import Image
from cowshed.cache.errors import UsageError
from cowshed.faults import FaultOptions
from cowshed.service.guests.guests import GuestTable, OpenRequest
from cowshed.service.overlays.files import OverlayRecord
from cowshed.service.overlays.overlay_records import InheritedOverlay
from cowshed.service.runtime.logs import EventLog

__all__ = ["Waiting", "WaitingOverlays"]

_log = EventLog("cowshed.overlays")


@dataclass(frozen=True)
class Waiting:
    """An overlay in files; staged is the handoff, which is ours, that staged it, or "".

    inherited is what the last backend left of it, if it did: its ledger has the bits of writes that
    were acknowledged and not flushed.
    """

    record: OverlayRecord
    staged: str
    request: OpenRequest
    inherited: InheritedOverlay | None


class WaitingOverlays:
    """The waiting overlays, by domain and guest name; under the overlay table's lock.

    Invariant: each has its name reserved in the guests' table.
    """

    def __init__(self, guests: GuestTable) -> None:
        self._guests: Final = guests
        self._waiting: Final[dict[tuple[str, str], Waiting]] = {}

    def add(
        self,
        image: Image,
        record: OverlayRecord,
        staged: str,
        inherited: InheritedOverlay | None,
    ) -> None:
        """Have an overlay wait for the image's digest; UsageError if its name is taken."""
        policy = QuotaPolicy[record.policy.upper()]
        request = OpenRequest(record.guest, image, record.quota_bytes, policy, FaultOptions())
        self._guests.reserve_name(request)
        self._waiting[request.key] = Waiting(record, staged, request, inherited)
        _log.notice(
            "overlay-waits",
            "the mtime of its image's source changed: it is used if the bytes are the same",
            overlay=record.label,
        )

    def take(self, image: Image) -> list[Waiting]:
        """Remove and return those of an image, and release their names."""
        taken = [each for each in self._waiting.values() if each.request.image is image]
        for each in taken:
            del self._waiting[each.request.key]
            self._guests.release_name(each.request)
        return taken

    def check(self, image: Image, name: str) -> None:
        """Raise UsageError if an overlay of that name waits."""
        if (image.domain, name) in self._waiting:
            raise UsageError(
                f"overlay {f'{image.label}@{name}'!r} cannot be used yet: its image's source has "
                "another mtime, and its bytes are being compared; try again in a moment"
            )
