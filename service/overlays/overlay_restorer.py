# SPDX-License-Identifier: Apache-2.0
"""Restore overlays after a restart: inherited ones, and those in --overlay-dir.

An overlay in files needs the same source that it was made of. If the source's mtime differs, only
the image's digest can tell whether it is the same: such overlays wait for the digest.
"""

from __future__ import annotations

from collections.abc import Container

from cowshed.cache import Image
from cowshed.cache.errors import CowshedError, UsageError
from cowshed.service.overlays.files import OverlayRecord
from cowshed.service.overlays.overlay_guest import OverlayGuest
from cowshed.service.overlays.overlay_records import InheritedOverlay
from cowshed.service.overlays.overlays import OverlayTable
from cowshed.service.persist.inherited import InheritedFds
from cowshed.service.runtime.logs import EventLog

__all__ = ["OverlayRestorer"]

_log = EventLog("cowshed.overlays")


class OverlayRestorer:
    """Restores overlays into the table."""

    def __init__(self, table: OverlayTable) -> None:
        self._table = table
        self._maker = table.maker
        self._files = table.maker.files
        self._records = table.maker.records

    def restore(
        self,
        images: list[Image],
        inherited_fds: InheritedFds | None = None,
        owned: Container[str] = (),
    ) -> None:
        """Restore inherited overlays and those in --overlay-dir, of the images served now.

        Staged ones are restored only if their handoff is in owned.
        """
        by_label = {image.label: image for image in images}
        all_inherited = self._records.take(inherited_fds or InheritedFds({}))
        self._restore_files(by_label, all_inherited, owned)
        for inherited in all_inherited.values():
            image = by_label.get(inherited.record.image)
            if (inherited.staged and inherited.staged not in owned) or self._is_mapped(
                image, inherited.record
            ):
                _log.info("overlay-forgotten", overlay=inherited.record.label)
                self._records.let_go(inherited)
                continue
            try:
                if image is None or self._files is not None or not inherited.has_pages:
                    raise UsageError(
                        "its image is not served, --overlay-dir changed, or its files are unusable"
                    )
                self._open(image, inherited.record, inherited)
            except (CowshedError, OSError) as error:
                _log.error("overlay-lost", str(error), overlay=inherited.record.label)
                self._records.let_go(inherited)
            else:
                _log.info("overlay-adopted", overlay=inherited.record.label)

    def restore_late(self, image: Image) -> None:
        """Restore the overlays in --overlay-dir of an image that is served only from now on."""
        self._restore_files({image.label: image}, {}, (), is_late=True)

    def _is_mapped(self, image: Image | None, record: OverlayRecord) -> bool:
        """Whether its guest maps by now: the last backend died before it withdrew the overlay."""
        return image is not None and self._table.guests.has((image.domain, record.guest))

    def _restore_files(
        self,
        by_label: dict[str, Image],
        all_inherited: dict[str, InheritedOverlay],
        owned: Container[str],
        *,
        is_late: bool = False,
    ) -> None:
        if self._files is None:
            return
        for record in self._files.records():
            image = by_label.get(record.image)
            if is_late and image is None:
                continue  # handled at the start
            staged = self._files.staged(record)
            if (staged and staged not in owned) or self._is_mapped(image, record):
                _log.info("overlay-forgotten", overlay=record.label)
                self._files.remove(record.image, record.guest)
                continue
            if image is None:
                _log.notice(
                    "overlay-left",
                    "its image is not served",
                    overlay=record.label,
                    file=record.stem,
                )
                continue
            self._restore_file(image, record, staged, all_inherited)

    def _restore_file(
        self,
        image: Image,
        record: OverlayRecord,
        staged: str,
        all_inherited: dict[str, InheritedOverlay],
    ) -> None:
        assert self._files is not None
        try:
            inherited = all_inherited.get(record.label)
            if not self._files.check(record, image):
                with self._table.lock:
                    self._table.waiting.add(image, record, staged, inherited)
                all_inherited.pop(record.label, None)
                return
            if inherited is not None and inherited.files is not None:
                self._files.check_same(record, inherited.files)
            guest = self._open(image, record, inherited)
            all_inherited.pop(record.label, None)
            if staged:
                self._files.write(record, image)
        except (CowshedError, OSError) as error:
            _log.error("overlay-unusable", str(error), overlay=record.label, file=record.stem)
        else:
            self._table.keep_digest(guest)
            _log.info("overlay-adopted", overlay=record.label)

    def note_digest(self, image: Image) -> None:
        """Restore or refuse the overlays that waited for an image's digest, which is known now.

        Also writes the digest to the image's records. The caller's thread may wait for a disk.
        """
        if self._files is None:
            return
        self._files.note_digest(image)
        with self._table.lock:
            waited = self._table.waiting.take(image)
            guests = [guest for guest in self._table if guest.image is image]
        for each in waited:
            inherited = {} if each.inherited is None else {each.record.label: each.inherited}
            self._restore_file(image, each.record, each.staged, inherited)
            for left in inherited.values():
                self._records.let_go(left)
        for guest in guests:
            self._table.keep_digest(guest)

    def _open(
        self,
        image: Image,
        record: OverlayRecord,
        inherited: InheritedOverlay | None = None,
    ) -> OverlayGuest:
        """Restore an overlay; takes over the inherited descriptors on success only."""
        guest = self._maker.make(image, record, keep_record=False, inherited=inherited)
        if inherited is not None:
            guest.pages_id = inherited.pages_id
        try:
            self._maker.keep(guest, inherited)
        except BaseException:
            self._maker.close(guest)
            raise
        self._table.insert(guest)
        return guest
