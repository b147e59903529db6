# SPDX-License-Identifier: Apache-2.0
"""The table of overlays, in which the backend keeps the private pages of guests without mappings.

An overlay is made when a client first enters IMAGE@GUEST. It is kept while no client is connected,
in memory or in files of --overlay-dir, until it is discarded. Only its owner and operators may
enter it. Its guest's name is taken among all guests of the domain, also those that map.

The loop and operators' threads change the table, under its lock. Lock order: the table's, then the
guests'. Nothing waits for a disk under either; entrance.py makes overlays in files in threads.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Final

from cowshed.accounting import (
    NO_QUOTA_BYTES,
    Overlay,
    QuotaPolicy,
)
from cowshed.cache import Image
from cowshed.cache.errors import CowshedError, InvariantError, UsageError
from cowshed.cache.images import PAGE_BYTES
from cowshed.faults import FaultOptions
from cowshed.service.guests.admission import Admission
from cowshed.service.guests.guests import GuestTable, OpenRequest
from cowshed.service.overlays.claims import Claim, check_may_enter, is_of
from cowshed.service.overlays.files import OverlayFiles, OverlayRecord
from cowshed.service.overlays.limits import OverlayLimits
from cowshed.service.overlays.overlay_guest import OverlayGuest
from cowshed.service.overlays.overlay_maker import OverlayMaker
from cowshed.service.overlays.overlay_records import OverlayRecords
from cowshed.service.overlays.waiting import WaitingOverlays
from cowshed.service.persist.fd_store import FdStore
from cowshed.service.runtime.logs import EventLog
from cowshed.transport.links.no_room import taking_in
from cowshed.transport.nbd.serving import NbdServer

__all__ = ["OverlayGuest", "OverlayTable"]

_log = EventLog("cowshed.overlays")


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
        """limits are those of guests that map nothing."""
        self.lock: Final = threading.RLock()
        self.guests: Final = guests
        self._limits = limits
        self._files = files
        self._records = records or OverlayRecords(FdStore(None))
        self.maker: Final = OverlayMaker(core, guests, admission, files, self._records)
        self._overlays: dict[tuple[str, str], OverlayGuest] = {}
        # Those being removed, each with the calls of when_free(); under the lock.
        self._leaving: dict[tuple[str, str], list[Callable[[], object]]] = {}
        self.waiting: Final = WaitingOverlays(guests)  # under the lock
        self._unused = threading.Condition(self.lock)

    def __iter__(self) -> Iterator[OverlayGuest]:
        return iter(list(self._overlays.values()))

    def knows_digest(self, image: Image) -> bool:
        """Whether records of overlays made from now on have their image's digest."""
        return self._files is not None and self._files.knows_digest(image)

    def keep_digest(self, guest: OverlayGuest) -> None:
        """Write its image's digest to an overlay's record; may wait for a disk."""
        with self.using(guest) as is_here, guest.record_lock:
            if is_here:
                self._refresh(guest)

    def _refresh(self, guest: OverlayGuest) -> None:
        assert self._files is not None
        try:
            self._files.refresh(guest.record(), guest.image)
        except CowshedError as error:
            _log.warning("overlay-source-not-kept", str(error), overlay=guest.label)

    # Clients.

    def names(self, image: Image, claim: Claim) -> list[str]:
        """Return the guests whose overlays of an image a client may enter."""
        return [guest.name for guest in self if guest.image is image and is_of(guest.owner, claim)]

    def check(self, image: Image, name: str, claim: Claim) -> None:
        """Raise what enter() would raise, as far as is known beforehand."""
        with self.lock:
            guest = self._overlays.get((image.domain, name))
            if guest is not None:
                check_may_enter(guest, image, claim)
            elif (image.domain, name) not in self._leaving:
                self.waiting.check(image, name)
                self.guests.check_free(
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
        """Enter the guest's overlay, made if there is none, as one more client; leave() undoes it.

        Quota and policy apply only when it is made. Raises NotYoursError, UsageError if the name is
        taken or a guest may not have that quota, CapacityError or SourceError if it cannot be made.
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

    def when_free(self, key: tuple[str, str], call: Callable[[], object]) -> bool:
        """If an overlay of that name is being removed, call call() once it is; False if not.

        The call is made in the thread that removes it.
        """
        with self.lock:
            if key in self._leaving:
                self._leaving[key].append(call)
                return True
            return False

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
        """Return the record of an overlay to be made for a client.

        UsageError for a quota that a guest may not have, and if such an overlay waits for its
        image's digest.
        """
        with self.lock:
            self.waiting.check(image, name)
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
        """Make an overlay that nobody can enter; the caller must place() or unstage() it.

        For any thread. Raises as enter() does. May wait for a disk, not under the table's lock.
        """
        guest = self.maker.make(image, record, keep_record=True)
        try:
            self.maker.keep(guest)
        except BaseException:  # no descriptor is left for its record
            self.unstage(guest)
            raise
        return guest

    def insert(self, guest: OverlayGuest) -> None:
        """Put an overlay into the table, again perhaps; from now on its owner may enter it."""
        with self.lock:
            self._overlays[guest.request.key] = guest
        self._end_leaving(guest)

    def place(self, guest: OverlayGuest) -> None:
        """Insert and log an overlay that was made."""
        self.insert(guest)
        _log.info("overlay-made", overlay=guest.label, owner=guest.owner)

    def withdraw_unused(self, guest: OverlayGuest) -> bool:
        """Take an overlay without clients out of the table, to unstage it; False if it has some."""
        with self.lock:
            if guest.nr_clients or self._overlays.get(guest.request.key) is not guest:
                return False
            self._take_out(guest)
            return True

    def leave(self, guest: OverlayGuest) -> None:
        """Leave an overlay, for one client of it."""
        with self.lock:
            guest.nr_clients -= 1
            if not guest.nr_clients:
                guest.pid = 0

    # Operators.

    def find(self, label: str) -> OverlayGuest:
        """Return the overlay IMAGE@GUEST; UsageError, listing those there are, if there is none."""
        for guest in self:
            if label in (guest.label, f"{guest.domain}/{guest.image.name}@{guest.name}"):
                return guest
        there = ", ".join(sorted(guest.label for guest in self)[:20])
        raise UsageError(f"no overlay {label!r}; there is {there or 'none'}")

    def discard(self, label: str, *, guest_asked: bool = False) -> int:
        """Discard an overlay without clients, and its files; return how many private bytes it had.

        guest_asked: the guest left and did not ask to keep it; logged at info, as this is frequent.
        """
        with self.lock:
            guest = self.find(label)
            if guest.nr_clients:
                clients = "1 client" if guest.nr_clients == 1 else f"{guest.nr_clients} clients"
                raise UsageError(f"overlay {guest.label!r} has {clients}: disconnect first")
            self._take_out(guest)
        # Its name stays reserved until it is closed; the disk is not waited for under the lock.
        self._wait_unused(guest)  # otherwise its record might be written again
        nr_bytes = guest.account.status().private_pages * PAGE_BYTES
        self.unstage(guest)
        if guest_asked:
            _log.info("overlay-discarded", overlay=guest.label, private=nr_bytes)
        else:
            _log.notice("overlay-discarded", overlay=guest.label, private=nr_bytes)
        return nr_bytes

    def set_quota(self, guest: OverlayGuest, quota_bytes: int | None) -> None:
        """Change a quota; clients may retry writes that failed at the old one.

        UsageError if the overlay was discarded meanwhile.
        """
        with self.using(guest) as is_here, guest.record_lock:
            if not is_here:
                raise UsageError(f"overlay {guest.label!r} is gone: it was discarded just now")
            policy = guest.quota.status().policy
            guest.quota.set_quota(NO_QUOTA_BYTES if quota_bytes is None else quota_bytes, policy)
            guest.quota_bytes = quota_bytes
            if self._files is not None:
                self._files.write(guest.record(), guest.image)

    # Handoffs.

    def stage(self, image: Image, record: OverlayRecord, pages_id: str) -> OverlayGuest:
        """Make an empty overlay that nobody can enter; the caller must admit() or unstage() it.

        Its name is taken. pages_id is that of the source's pages. Raises as enter() does.
        """
        guest = self.maker.make(image, record, keep_record=False, is_staged=True)
        guest.pages_id = pages_id
        return guest

    def keep_staged(self, guest: OverlayGuest, handoff: str) -> None:
        """Have the keeper hold a staged overlay; a successor admits it if the handoff is ours.

        Raises SourceError if its pages cannot be made durable.
        """
        if self._files is not None:
            guest.overlay.flush()
            self._files.write(guest.record(), guest.image, handoff)
        self.maker.keep(guest, staged=handoff)

    def check_name(self, domain: str, name: str) -> None:
        """Raise UsageError if a name is taken, so that nothing can be staged under it."""
        with self.lock:
            self.guests.check_name(domain, name)

    def admit(self, guest: OverlayGuest) -> None:
        """Let the owner of a staged overlay enter it from now on. Raises SourceError."""
        if self._files is not None:
            self._files.write(guest.record(), guest.image)
        with self.lock:
            if guest.group:
                self._records.admit(guest.group)
            else:
                self.maker.keep(guest)
            self._overlays[guest.request.key] = guest
        _log.info("overlay-admitted", overlay=guest.label, owner=guest.owner)

    def claim(self, key: tuple[str, str], image: Image, owner: str) -> OverlayGuest | None:
        """Enter the overlay of a name for its owner, if it has no client; leave() undoes it."""
        with self.lock:
            guest = self._overlays.get(key)
            if guest is None or guest.image is not image or guest.nr_clients:
                return None
            if guest.owner != owner:
                return None
            guest.nr_clients += 1
            return guest

    def get(self, domain: str, name: str) -> OverlayGuest | None:
        """Return the overlay of a guest's name, or None."""
        with self.lock:
            return self._overlays.get((domain, name))

    @contextlib.contextmanager
    def using(self, guest: OverlayGuest) -> Iterator[bool]:
        """Keep an overlay from being closed inside `with`; for any thread. Yields False if gone."""
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
        """Discard an overlay that is not in the table; its name is free even if its files stay."""
        with self.lock:
            self._leaving.setdefault(guest.request.key, [])
        try:
            guest.overlay.discard()
            if self._files is not None:
                self._files.remove(guest.image.label, guest.name)
        finally:
            self._close(guest)

    def withdraw(self, guest: OverlayGuest) -> None:
        """Remove an overlay whose pages are elsewhere now; it must have no clients."""
        with self.lock:
            if guest.request.key not in self._overlays:
                return
            self._take_out(guest)
        self._wait_unused(guest)
        try:
            if self._files is not None:
                self._files.remove(guest.image.label, guest.name)
        finally:
            self._close(guest)

    # Audits and metrics.

    def check_all(self) -> None:
        """Recompute the invariants of every overlay. Raises InvariantError."""
        with self.lock:
            for key, guest in self._overlays.items():
                sums = guest.overlay.sums()
                if key != guest.request.key or guest.nr_clients < 0 or guest.nr_users < 0:
                    raise InvariantError(f"overlays: {key} has {guest.nr_clients} clients")
                if sums.counted != sums.private or sums.used != sums.private + sums.in_hand:
                    raise InvariantError(f"overlays: {key} counts {sums}")

    @contextlib.contextmanager
    def of_image(self, image: Image) -> Iterator[dict[str, Overlay]]:
        """Yield the overlays of an image by guest name, kept open inside `with`."""
        with self.lock:
            yield {guest.name: guest.overlay for guest in self if guest.image is image}

    def close(self) -> None:
        """Close every overlay; files are flushed and stay. No client may be connected."""
        for guest in self:
            self._close(guest)
        self._overlays.clear()

    def _wait_unused(self, guest: OverlayGuest) -> None:
        with self.lock:
            while guest.nr_users:
                self._unused.wait()

    def _take_out(self, guest: OverlayGuest) -> None:
        """Take an overlay out of the table, to close it; under the lock."""
        del self._overlays[guest.request.key]
        self._leaving[guest.request.key] = []

    def _end_leaving(self, guest: OverlayGuest) -> None:
        with self.lock:
            calls = self._leaving.pop(guest.request.key, [])
        for call in calls:
            call()

    def _close(self, guest: OverlayGuest) -> None:
        self._wait_unused(guest)
        self.maker.close(guest)
        self._end_leaving(guest)
