# SPDX-License-Identifier: Apache-2.0
"""Make overlays of account, quota, pages and export; have them held for a successor; close them."""

from __future__ import annotations

import contextlib
import os
from typing import Final

from cowshed.accounting import NO_QUOTA_BYTES, Account, Overlay, Quota, QuotaPolicy
from cowshed.cache import Image
from cowshed.cache.errors import CowshedError, UsageError
from cowshed.faults import FaultOptions
from cowshed.service.guests.admission import Admission
from cowshed.service.guests.guests import GuestTable, OpenRequest
from cowshed.service.overlays.files import OverlayFiles, OverlayRecord
from cowshed.service.overlays.overlay_guest import OverlayGuest
from cowshed.service.overlays.overlay_records import InheritedOverlay, OverlayRecords
from cowshed.service.runtime.logs import EventLog
from cowshed.transport.nbd.serving import NbdExport, NbdServer

__all__ = ["OverlayMaker"]

_log = EventLog("cowshed.overlays")

# The account, the quota, the pages, their map or the record, and one to spare.
_FDS_PER_OVERLAY: Final = 5


class OverlayMaker:
    """Makes and closes overlays; for any thread. May wait for a disk, under no lock.

    Each overlay has its name reserved in the guests' table, and a place in the Admission.
    """

    def __init__(
        self,
        core: NbdServer,
        guests: GuestTable,
        admission: Admission,
        files: OverlayFiles | None,
        records: OverlayRecords,
    ) -> None:
        self.files: Final = files
        self.records: Final = records
        self._core = core
        self._guests = guests
        self._admission = admission

    def make(
        self,
        image: Image,
        record: OverlayRecord,
        *,
        keep_record: bool,
        inherited: InheritedOverlay | None = None,
        is_staged: bool = False,
    ) -> OverlayGuest:
        """Make an overlay, or restore an inherited one, whose descriptors it takes on success only.

        keep_record: write its record's file. Raises UsageError if the name is taken or there are
        too many guests, CapacityError or SourceError if it cannot be made; leaves nothing then.
        """
        policy = QuotaPolicy[record.policy.upper()]
        request = OpenRequest(record.guest, image, record.quota_bytes, policy, FaultOptions())
        with contextlib.ExitStack() as undo:
            self._guests.reserve_name(request)
            undo.callback(self._guests.release_name, request)
            if refusal := self._admission.enter(record.counted_as, _FDS_PER_OVERLAY):
                raise UsageError(f"overlay {record.label!r} cannot be made: {refusal}")
            undo.callback(self._admission.leave, record.counted_as, _FDS_PER_OVERLAY)
            if is_staged and self.files is not None:
                self.files.clear(record)  # no other thread makes one: the name is reserved
            limit_bytes = NO_QUOTA_BYTES if record.quota_bytes is None else record.quota_bytes
            quota = (
                Quota(limit_bytes, policy)
                if inherited is None
                else Quota.adopt(os.dup(inherited.quota))
            )
            undo.callback(quota.close)
            account = Account(image, quota, None if inherited is None else os.dup(inherited.ledger))
            undo.callback(account.close)
            if self.files is None:
                overlay = Overlay(account) if inherited is None else inherited.open_pages(account)
            else:
                if keep_record:
                    self.files.check_free(record)
                    self.files.write(record, image)
                    undo.callback(self.files.remove, image.label, record.guest)
                overlay = self.files.open(record, account, is_adopted=inherited is not None)
            undo.callback(overlay.close)
            export = NbdExport(self._core, image, overlay.cdata)
            undo.pop_all()
        return OverlayGuest(
            request=request,
            owner=record.owner,
            counted_as=record.counted_as,
            transport=record.transport,
            uid=record.uid,
            pid=0,
            quota=quota,
            account=account,
            overlay=overlay,
            export=export,
            quota_bytes=quota.limit_bytes,
        )

    def keep(
        self, guest: OverlayGuest, inherited: InheritedOverlay | None = None, *, staged: str = ""
    ) -> None:
        """Have the keeper hold an overlay; staged is the handoff that brought it."""
        fds = [guest.account.fd, guest.quota.fd]
        record = guest.record()
        if self.files is None:
            fds.append(guest.overlay.fd)
        files = None
        if self.files is not None:
            with contextlib.suppress(OSError):
                files = self.files.identity(record)
        guest.group = self.records.keep(record, guest.pages_id, fds, inherited, staged, files)
        if inherited is not None:
            self.records.admit(guest.group)

    def close(self, guest: OverlayGuest) -> None:
        """Close an overlay that is not in use; files are flushed and stay."""
        guest.export.close()
        # The keeper releases it before its descriptors are closed. With files, the flush must come
        # first: until then the ledger has the bits of unflushed pages.
        if self.files is None:
            self.records.release(guest.group)
        try:
            guest.overlay.close()
        except (CowshedError, OSError) as error:
            _log.error("overlay-not-flushed", str(error), overlay=guest.label)
        if self.files is not None:
            self.records.release(guest.group)
        guest.account.close()
        guest.quota.close()
        self._guests.release_name(guest.request)
        self._admission.leave(guest.counted_as, _FDS_PER_OVERLAY)
