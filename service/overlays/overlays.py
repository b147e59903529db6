# SPDX-License-Identifier: Apache-2.0
"""Guests without mappings: the backend keeps their private pages for them, in overlays.

An overlay is made when a client first enters IMAGE@GUEST. It is kept while nobody is connected, in
memory or in files of --overlay-dir, until it is discarded. Only who made it may come back to it,
and operators. Its guest's name is taken among all guests of the domain, mapped ones too.

The table is changed by the loop and by operators' threads, under its lock; lock order: the
table's, then the guests'. Nothing waits for a disk under either: entrance.py has clients enter.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Container, Iterator
from typing import Final

from cowshed.accounting import (
    NO_QUOTA_BYTES,
    Account,
    Overlay,
    Quota,
    QuotaPolicy,
)
from cowshed.cache import Image
from cowshed.cache.errors import CowshedError, UsageError
from cowshed.cache.images import PAGE_BYTES
from cowshed.faults import FaultOptions
from cowshed.service.guests.admission import Admission
from cowshed.service.guests.guests import GuestTable, OpenRequest
from cowshed.service.overlays.claims import Claim, check_may_enter, is_of
from cowshed.service.overlays.files import OverlayFiles, OverlayRecord
from cowshed.service.overlays.limits import OverlayLimits
from cowshed.service.overlays.overlay_guest import OverlayGuest
from cowshed.service.overlays.overlay_records import InheritedOverlay, OverlayRecords
from cowshed.service.overlays.waiting import WaitingOverlays
from cowshed.service.persist.fd_store import FdStore
from cowshed.service.persist.inherited import InheritedFds
from cowshed.service.runtime.logs import EventLog
from cowshed.transport.links.no_room import taking_in
from cowshed.transport.nbd.serving import NbdExport, NbdServer

__all__ = ["OverlayGuest", "OverlayTable"]

_log = EventLog("cowshed.overlays")

# Its account, its quota, its pages, their map or its record, and one to spare.
_FDS_PER_OVERLAY: Final = 5


class OverlayTable:
    """All overlays, by domain and guest name.

    Invariant: each has its name reserved in the guests' table, and a place in the Admission.
    """

    def __init__(
        self,
        core: NbdServer,
        guests: GuestTable,
        admission: Admission,
        limits: OverlayLimits,
        files: OverlayFiles | None = None,
        records: OverlayRecords | None = None,
    ) -> None:
        """limits are for the guests that map nothing."""
        self.lock: Final = threading.RLock()
        self._core = core
        self._guests = guests
        self._admission = admission
        self._limits = limits
        self._files = files
        self._records = records or OverlayRecords(FdStore(None))
        self._overlays: dict[tuple[str, str], OverlayGuest] = {}
        self._waiting = WaitingOverlays(guests)
        self._unused = threading.Condition(self.lock)

    def __iter__(self) -> Iterator[OverlayGuest]:
        return iter(list(self._overlays.values()))

    def adopt(
        self,
        images: list[Image],
        inherited_fds: InheritedFds | None = None,
        owned: Container[str] = (),
    ) -> None:
        """Go on with what our predecessor left, and with what is in --overlay-dir.

        Of the images that are served now; of what handoffs had staged, that of those that are ours.
        """
        by_label = {image.label: image for image in images}
        all_inherited = self._records.take(inherited_fds or InheritedFds({}))
        self._adopt_files(by_label, all_inherited, owned)
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
                    raise UsageError("nothing served now is made of it")
                self._open(image, inherited.record, inherited)
            except (CowshedError, OSError) as error:
                _log.error("overlay-lost", str(error), overlay=inherited.record.label)
                self._records.let_go(inherited)
            else:
                _log.info("overlay-adopted", overlay=inherited.record.label)

    def adopt_late(self, image: Image) -> None:
        """Go on with what is in --overlay-dir of an image that is served only from now on."""
        self._adopt_files({image.label: image}, {}, (), is_late=True)

    def _is_mapped(self, image: Image | None, record: OverlayRecord) -> bool:
        """Whether its guest maps by now: the death came before the overlay could be given up."""
        return image is not None and self._guests.has((image.domain, record.guest))

    def _adopt_files(
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
                continue  # seen to at the start
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
            self._adopt_file(image, record, staged, all_inherited)

    def _adopt_file(
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
                with self.lock:
                    self._waiting.add(image, record, staged)
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
            self._refresh(guest)
            _log.info("overlay-adopted", overlay=record.label)

    def note_digest(self, image: Image) -> None:
        """An image's digest is known: go on with the overlays that waited for it, or refuse them.

        From a thread that may wait for a disk. It is kept with the image's overlays, too.
        """
        if self._files is None:
            return
        self._files.note_digest(image)
        with self.lock:
            waited = self._waiting.take(image)
            guests = [guest for guest in self if guest.image is image]
        for each in waited:
            self._adopt_file(image, each.record, each.staged, {})
        for guest in guests:
            self.keep_digest(guest)

    def knows_digest(self, image: Image) -> bool:
        """Whether overlays that are made from now on are kept with their image's digest."""
        return self._files is not None and self._files.knows_digest(image)

    def keep_digest(self, guest: OverlayGuest) -> None:
        """Keep the digest that its image has by now with an overlay; may wait for a disk."""
        with self.using(guest) as is_here, guest.record_lock:
            if is_here:
                self._refresh(guest)

    def _refresh(self, guest: OverlayGuest) -> None:
        assert self._files is not None
        try:
            self._files.refresh(self._record(guest), guest.image)
        except CowshedError as error:
            _log.warning("overlay-source-not-kept", str(error), overlay=guest.label)

    # Clients.

    def names(self, image: Image, claim: Claim) -> list[str]:
        """The guests whose overlays of an image a client may come back to."""
        return [guest.name for guest in self if guest.image is image and is_of(guest.owner, claim)]

    def check(self, image: Image, name: str, claim: Claim) -> None:
        """Refuse what enter() would refuse, as far as can be known beforehand."""
        with self.lock:
            guest = self._overlays.get((image.domain, name))
            if guest is not None:
                check_may_enter(guest, image, claim)
            else:
                self._waiting.check(image, name)
                self._guests.check_free(
                    OpenRequest(name, image, None, QuotaPolicy.STOP, FaultOptions())
                )

    @taking_in()
    def enter(
        self,
        image: Image,
        name: str,
        claim: Claim,
        *,
        quota_bytes: int | None = None,
        policy: QuotaPolicy | None = None,
    ) -> OverlayGuest:
        """Give the guest's overlay to one more client, made if there is none; leave() undoes it.

        The quota and policy named count when it is made. Raises NotYoursError, UsageError for a
        name that is taken or a quota that nobody may have, CapacityError or SourceError if it
        cannot be made.
        """
        with self.lock:
            guest = self._overlays.get((image.domain, name))
            if guest is None:
                guest = self.make(image, self.record(image, name, claim, quota_bytes, policy))
                self.place(guest)
            else:
                check_may_enter(guest, image, claim)
            guest.nr_clients += 1
            guest.transport, guest.pid = claim.transport, claim.pid
            return guest

    @property
    def in_files(self) -> bool:
        """Whether making an overlay waits for a disk."""
        return self._files is not None

    def record(
        self,
        image: Image,
        name: str,
        claim: Claim,
        quota_bytes: int | None,
        policy: QuotaPolicy | None,
    ) -> OverlayRecord:
        """Say what a client's overlay is to be; UsageError for a quota that nobody may have.

        And for one that waits for its image's digest.
        """
        with self.lock:
            self._waiting.check(image, name)
        quota_bytes, policy = self._limits.agree(quota_bytes, policy)
        return OverlayRecord(
            image=image.label,
            guest=name,
            owner=claim.owners[0],
            counted_as=claim.counted_as,
            transport=claim.transport,
            uid=claim.uid,
            quota_bytes=quota_bytes,
            policy=policy.name.lower(),
        )

    @taking_in()
    def make(self, image: Image, record: OverlayRecord) -> OverlayGuest:
        """Make an overlay that nobody can enter, in any thread: place() or unstage() it.

        Raises as enter() does. It may wait for a disk, and takes no lock of the table for that.
        """
        guest = self._make(image, record, keep_record=True)
        try:
            self._hold(guest)
        except BaseException:  # no descriptor is left for its record
            self.unstage(guest)
            raise
        return guest

    def place(self, guest: OverlayGuest) -> None:
        """From now on its owner may enter an overlay that was made."""
        with self.lock:
            self._overlays[guest.request.key] = guest
        _log.info("overlay-made", overlay=guest.label, owner=guest.owner)

    def withdraw_unused(self, guest: OverlayGuest) -> bool:
        """Take an overlay out that nobody is in, to be unstaged; False if somebody is."""
        with self.lock:
            if guest.nr_clients or self._overlays.get(guest.request.key) is not guest:
                return False
            del self._overlays[guest.request.key]
            return True

    def leave(self, guest: OverlayGuest) -> None:
        """One client of it has gone."""
        with self.lock:
            guest.nr_clients -= 1
            if not guest.nr_clients:
                guest.pid = 0

    # Operators.

    def find(self, label: str) -> OverlayGuest:
        """The overlay that IMAGE@GUEST means; UsageError, with those there are, if none does."""
        for guest in self:
            if label in (guest.label, f"{guest.domain}/{guest.image.name}@{guest.name}"):
                return guest
        there = ", ".join(sorted(guest.label for guest in self)[:20])
        raise UsageError(f"no overlay {label!r}; there is {there or 'none'}")

    def discard(self, label: str, *, guest_asked: bool = False) -> int:
        """Forget an overlay that nobody is connected to, its files too; how many bytes it had.

        guest_asked: it left and wanted nothing kept, as happens all the time.
        """
        with self.lock:
            guest = self.find(label)
            if guest.nr_clients:
                clients = "1 client" if guest.nr_clients == 1 else f"{guest.nr_clients} clients"
                raise UsageError(f"overlay {guest.label!r} has {clients}: disconnect first")
            del self._overlays[guest.request.key]
        # Its name stays reserved until it is closed; nobody waits for the disk meanwhile.
        self._wait_unused(guest)  # or its record would be written again
        nr_bytes = guest.account.status().private_pages * PAGE_BYTES
        guest.overlay.discard()
        if self._files is not None:
            self._files.remove(guest.image.label, guest.name)
        self._close(guest)
        if guest_asked:
            _log.info("overlay-discarded", overlay=guest.label, private=nr_bytes)
        else:
            _log.notice("overlay-discarded", overlay=guest.label, private=nr_bytes)
        return nr_bytes

    def set_quota(self, guest: OverlayGuest, quota_bytes: int | None) -> None:
        """Change a quota; writes that failed at the old one may be tried again.

        UsageError for one that was discarded since it was found.
        """
        with self.using(guest) as is_here, guest.record_lock:
            if not is_here:
                raise UsageError(f"overlay {guest.label!r} is gone: it was discarded just now")
            policy = guest.quota.status().policy
            guest.quota.set_quota(NO_QUOTA_BYTES if quota_bytes is None else quota_bytes, policy)
            guest.quota_bytes = quota_bytes
            if self._files is not None:
                self._files.write(self._record(guest), guest.image)

    # Handoffs.

    def stage(self, image: Image, record: OverlayRecord, pages_id: str) -> OverlayGuest:
        """Make an empty overlay that nobody can enter, its name taken: admit() or unstage() it.

        pages_id is what its pages were called where they come from. Raises as enter() does.
        """
        guest = self._make(image, record, keep_record=False, is_staged=True)
        guest.pages_id = pages_id
        return guest

    def keep_staged(self, guest: OverlayGuest, handoff: str) -> None:
        """Have a staged overlay outlive us: a successor admits it if that handoff is owned by us.

        Raises SourceError if its pages cannot be made durable.
        """
        if self._files is not None:
            guest.overlay.flush()
            self._files.write(self._record(guest), guest.image, handoff)
        self._hold(guest, staged=handoff)

    def check_name(self, domain: str, name: str) -> None:
        """Raise UsageError if a name is taken: nothing could be staged under it."""
        with self.lock:
            self._guests.check_name(domain, name)

    def admit(self, guest: OverlayGuest) -> None:
        """From now on the owner of a staged overlay may enter it. Raises SourceError."""
        if self._files is not None:
            self._files.write(self._record(guest), guest.image)
        with self.lock:
            if guest.group:
                self._records.admit(guest.group)
            else:
                self._hold(guest)
            self._overlays[guest.request.key] = guest
        _log.info("overlay-admitted", overlay=guest.label, owner=guest.owner)

    def claim(self, key: tuple[str, str], image: Image, owner: str) -> OverlayGuest | None:
        """Hold the overlay of a name for its owner, if nobody else does; leave() undoes it."""
        with self.lock:
            guest = self._overlays.get(key)
            if guest is None or guest.image is not image or guest.nr_clients:
                return None
            if guest.owner != owner:
                return None
            guest.nr_clients += 1
            return guest

    def get(self, domain: str, name: str) -> OverlayGuest | None:
        """Give the overlay of a guest's name, if there is one."""
        with self.lock:
            return self._overlays.get((domain, name))

    @contextlib.contextmanager
    def using(self, guest: OverlayGuest) -> Iterator[bool]:
        """Keep an overlay from being closed inside `with`, in any thread; False: it is gone."""
        with self.lock:
            is_here = self._overlays.get(guest.request.key) is guest
            guest.nr_users += is_here
        try:
            yield is_here
        finally:
            with self.lock:
                guest.nr_users -= is_here
                self._unused.notify_all()

    def unstage(self, guest: OverlayGuest) -> None:
        """Forget a staged overlay."""
        guest.overlay.discard()
        if self._files is not None:
            self._files.remove(guest.image.label, guest.name)
        self._close(guest)

    def withdraw(self, guest: OverlayGuest) -> None:
        """Forget an overlay whose pages are elsewhere now; nobody is connected to it any more."""
        with self.lock:
            if self._overlays.pop(guest.request.key, None) is None:
                return
        self._wait_unused(guest)
        if self._files is not None:
            self._files.remove(guest.image.label, guest.name)
        self._close(guest)

    # Audits and metrics.

    @contextlib.contextmanager
    def of_image(self, image: Image) -> Iterator[dict[str, Overlay]]:
        """Give the overlays of an image by guest name, kept open inside `with`."""
        with self.lock:
            yield {guest.name: guest.overlay for guest in self if guest.image is image}

    def close(self) -> None:
        """Close every overlay; files are flushed and stay. No client is connected any more."""
        for guest in self:
            self._close(guest)
        self._overlays.clear()

    # Making and closing.

    def _open(
        self,
        image: Image,
        record: OverlayRecord,
        inherited: InheritedOverlay | None = None,
    ) -> OverlayGuest:
        """Go on with an overlay; what was left of it is taken over on success only."""
        guest = self._make(image, record, keep_record=False, inherited=inherited)
        if inherited is not None:
            guest.pages_id = inherited.pages_id
        try:
            self._hold(guest, inherited)
        except BaseException:
            self._close(guest)
            raise
        with self.lock:
            self._overlays[guest.request.key] = guest
        return guest

    def _hold(
        self, guest: OverlayGuest, inherited: InheritedOverlay | None = None, *, staged: str = ""
    ) -> None:
        fds = [guest.account.fd, guest.quota.fd]
        record = self._record(guest)
        if self._files is None:
            fds.append(guest.overlay.fd)
        files = None
        if self._files is not None:
            with contextlib.suppress(OSError):
                files = self._files.identity(record)
        guest.group = self._records.hold(record, guest.pages_id, fds, inherited, staged, files)
        if inherited is not None:
            self._records.admit(guest.group)

    def _make(
        self,
        image: Image,
        record: OverlayRecord,
        *,
        keep_record: bool,
        inherited: InheritedOverlay | None = None,
        is_staged: bool = False,
    ) -> OverlayGuest:
        policy = QuotaPolicy[record.policy.upper()]
        request = OpenRequest(record.guest, image, record.quota_bytes, policy, FaultOptions())
        with contextlib.ExitStack() as undo:
            self._guests.reserve_name(request)
            undo.callback(self._guests.release_name, request)
            if refusal := self._admission.enter(record.counted_as, _FDS_PER_OVERLAY):
                raise UsageError(f"overlay {record.label!r} cannot be made: {refusal}")
            undo.callback(self._admission.leave, record.counted_as, _FDS_PER_OVERLAY)
            if is_staged and self._files is not None:
                self._files.clear(record)  # nobody else makes any of that name now
            limit_bytes = NO_QUOTA_BYTES if record.quota_bytes is None else record.quota_bytes
            quota = (
                Quota(limit_bytes, policy)
                if inherited is None
                else Quota.adopt(os.dup(inherited.quota))
            )
            undo.callback(quota.close)
            account = Account(image, quota, None if inherited is None else os.dup(inherited.ledger))
            undo.callback(account.close)
            if self._files is None:
                overlay = Overlay(account) if inherited is None else inherited.open_pages(account)
            else:
                if keep_record:
                    self._files.check_free(record)
                    self._files.write(record, image)
                    undo.callback(self._files.remove, image.label, record.guest)
                overlay = self._files.open(record, account, is_adopted=inherited is not None)
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

    def _wait_unused(self, guest: OverlayGuest) -> None:
        with self.lock:
            while guest.nr_users:
                self._unused.wait()

    def _close(self, guest: OverlayGuest) -> None:
        self._wait_unused(guest)
        guest.export.close()
        # Held no more before a descriptor of it is closed, and after what it is held for is done:
        # of one in files the ledger knows what is not flushed.
        if self._files is None:
            self._records.release(guest.group)
        try:
            guest.overlay.close()
        except (CowshedError, OSError) as error:
            _log.error("overlay-not-flushed", str(error), overlay=guest.label)
        if self._files is not None:
            self._records.release(guest.group)
        guest.account.close()
        guest.quota.close()
        self._guests.release_name(guest.request)
        self._admission.leave(guest.counted_as, _FDS_PER_OVERLAY)

    def _record(self, guest: OverlayGuest) -> OverlayRecord:
        return OverlayRecord(
            image=guest.image.label,
            guest=guest.name,
            owner=guest.owner,
            counted_as=guest.counted_as,
            transport=guest.transport,
            uid=guest.uid,
            quota_bytes=guest.quota_bytes,
            policy=guest.request.policy.name.lower(),
        )
