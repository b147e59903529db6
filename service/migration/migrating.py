# SPDX-License-Identifier: Apache-2.0
"""Migrating guests of each kind behind one interface, and their blockers.

A guest that maps has its private pages in its own memory, where they are read through the
descriptor of /proc/PID/mem that it sent. One that maps nothing has them in its overlay.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Final, Protocol

from cowshed.accounting import AccountStatus, MissingPages
from cowshed.accounting.page_runs import PackedRuns, page_bitmap
from cowshed.cache import CowshedError, Image, PeerError
from cowshed.cache.errors import PeerGoneError
from cowshed.service.guests.guests import Guest, GuestTable
from cowshed.service.overlays.claims import CARRIER
from cowshed.service.overlays.overlays import OverlayGuest
from cowshed.service.runtime.logs import EventLog
from cowshed.transport.handoff.sections import GuestSection

__all__ = [
    "MigratingGuest",
    "MigratingMapping",
    "MigratingOverlay",
    "counters_of",
    "owner_of_token",
    "thaw_all",
]

_log = EventLog("cowshed.drain")


def owner_of_token(token: str) -> str:
    """Return the owner of an overlay that any client with the token may enter."""
    return f"token {hashlib.sha256(token.encode()).hexdigest()[:32]}"


class MigratingGuest(Protocol):
    """One migrating guest. Bitmaps are ints: bit i is page i."""

    token: str

    @property
    def name(self) -> str:
        """Its name, unique in its domain."""

    @property
    def image(self) -> Image:
        """Its image."""

    def keep_token(self, token: str) -> None:
        """Use the token that an earlier export made, unless the guest named one."""

    def blockers(self) -> list[str]:
        """Return why it cannot move; empty if it can."""

    def section(self, image_no: int) -> GuestSection:
        """Describe it to the target."""

    def track(self, on: bool) -> None:
        """Begin or end to track writes, for take_dirty()."""

    def take_dirty(self) -> int:
        """Return the pages made private or written since the last call, or since track()."""

    def freeze(self) -> None:
        """Stop all changes of its private bytes, from the return of this until thaw()."""

    def flush(self) -> None:
        """Make its pages as durable as they can be. Raises SourceError."""

    def thaw(self) -> None:
        """Let it write again."""

    def private(self, *, settles: bool = True) -> int:
        """Return the private pages there are now; settles: without charges never used."""

    def load(self, runs: PackedRuns, to: memoryview) -> None:
        """Copy private pages, zeros of a guest that has left; `to` is as long.

        PeerError if they are unreadable.
        """

    def counters(self) -> dict[str, int]:
        """Return its counters."""


def thaw_all(migrating: Iterable[MigratingGuest]) -> None:
    """Thaw guests, and then end tracking; one that fails leaves no other frozen."""
    for each in migrating:
        each.thaw()
    for each in migrating:
        try:
            each.track(False)
        except CowshedError as error:  # its pages are opened one by one as it writes them
            _log.warning("still-tracked", str(error), guest=each.name)


def _bits(bitmap: bytes) -> int:
    return int.from_bytes(bitmap, "little")


def counters_of(status: AccountStatus) -> dict[str, int]:
    """Return the counters of a section."""
    return {**asdict(status.counters), "private_pages": status.private_pages}


class MigratingOverlay:
    """A guest whose private pages the backend keeps."""

    def __init__(self, guest: OverlayGuest) -> None:
        self.guest: Final = guest
        self.token = guest.pages_id  # by which a client that reconnects knows its pages

    @property
    def name(self) -> str:
        """Its name."""
        return self.guest.name

    @property
    def image(self) -> Image:
        """Its image."""
        return self.guest.image

    def keep_token(self, token: str) -> None:
        """Do nothing: it has one."""

    def blockers(self) -> list[str]:
        """Return why it cannot move: pages still at the backend it came from, or lost."""
        if self.guest.owner.startswith(CARRIER):
            return ["its program has not yet moved here from its old backend; wait until it has"]
        missing = MissingPages(self.guest.overlay)
        if missing.nr_lost:
            why = "were lost with the backend it came from; let it write them anew, or discard it"
            return [f"{missing.nr_lost} of its private pages {why}"]
        if missing.nr_left:
            why = "have not arrived yet from the backend it came from; wait until they have"
            return [f"{missing.nr_left} of its private pages {why}"]
        return []

    def section(self, image_no: int) -> GuestSection:
        """Describe it to the target, with its owner, so that its clients can enter it there."""
        guest = self.guest
        return GuestSection(
            name=guest.name,
            image=image_no,
            uid=guest.uid,
            quota_bytes=guest.quota.limit_bytes,
            policy=guest.quota.status().policy.name.lower(),
            token=self.token,
            owner=guest.owner,
            transport=guest.transport,
            counters=self.counters(),
        )

    def track(self, on: bool) -> None:
        """Begin or end to track writes."""
        self.guest.overlay.track(on)

    def take_dirty(self) -> int:
        """Return the pages written since the last call."""
        return _bits(self.guest.overlay.take_dirty())

    def freeze(self) -> None:
        """Stall its clients' writes."""
        self.guest.overlay.freeze()

    def flush(self) -> None:
        """Sync its pages, if they are in files."""
        self.guest.overlay.flush()

    def thaw(self) -> None:
        """Resume the writes."""
        self.guest.overlay.thaw()

    def private(self, *, settles: bool = True) -> int:  # noqa: ARG002
        """Return its private pages: no other is ever charged."""
        return _bits(self.guest.account.private_bitmap())

    def load(self, runs: PackedRuns, to: memoryview) -> None:
        """Copy pages out of the overlay."""
        self.guest.overlay.load_runs(runs, to)

    def counters(self) -> dict[str, int]:
        """Return its counters."""
        return counters_of(self.guest.account.status())


class MigratingMapping:
    """A guest that maps the image. It may leave at any time, and then moves without pages.

    One whose memory is gone, since it ended or executed another program, has left as well, whatever
    keeps its mapping in the table.

    Until it is frozen, it may discard a page after we listed the page and before we read it. load()
    returns such a page as zeros and marks it as dirty, so that the next take_dirty() returns it.
    """

    def __init__(self, guest: Guest, guests: GuestTable) -> None:
        self.guest: Final = guest
        self._guests = guests
        self._mapping = guest.mappings[0]
        self.token = guest.request.token or secrets.token_hex(16)
        self._frozen = False
        self._ended = False  # its memory is gone
        self._unread = 0  # pages, as bits

    @property
    def name(self) -> str:
        """Its name."""
        return self.guest.name

    @property
    def image(self) -> Image:
        """Its image."""
        return self.guest.image

    def keep_token(self, token: str) -> None:
        """Use that token, unless the guest named one."""
        if self.guest.request.token is None:
            self.token = token

    @property
    def is_here(self) -> bool:
        """Whether it has its memory, and is attached; under the table's lock it stays attached."""
        return not self._ended and self._mapping in self.guest.mappings

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        """Lock the table, and yield is_here. PeerGoneError ends the block: the guest has left."""
        with self._guests.lock:
            try:
                yield self.is_here
            except PeerGoneError as error:
                self._ended = True
                _log.info("guest-gone", str(error), guest=self.name)

    def blockers(self) -> list[str]:
        """Return why it cannot move; several mappings may have different bytes for one page."""
        status = self.guest.status()
        if status is None or not self.is_here:
            return []
        if len(self.guest.mappings) > 1:
            nr = len(self.guest.mappings)
            return [f"it has {nr} mappings with private pages of their own; end all but one"]
        if status.broken:
            return [f"its memory cannot be served ({os.strerror(-status.broken)}); end it"]
        if status.stopped_since_ns:
            return ["it is stopped at its quota, in the middle of a write; raise the quota"]
        if len(self._mapping.fds) < 3:
            return ["its memory cannot be read: it gave no /proc/PID/mem; end it"]
        return []

    def section(self, image_no: int) -> GuestSection:
        """Describe it to the target, owned by its token, whatever its transport there."""
        return GuestSection(
            name=self.name,
            image=image_no,
            uid=self.guest.uid,
            quota_bytes=self.guest.quota.limit_bytes,
            policy=self.guest.quota.status().policy.name.lower(),
            token=self.token,
            owner=owner_of_token(self.token),
            transport=self.guest.transport,
            counters=self.counters(),
        )

    def track(self, on: bool) -> None:
        """Begin or end to track writes."""
        with self._locked() as is_here:
            if is_here:
                self._mapping.handler.track(on)

    def take_dirty(self) -> int:
        """Return the pages written since the last call."""
        with self._locked() as is_here:
            unread, self._unread = self._unread, 0
            if is_here:
                return unread | _bits(self._mapping.account.take_dirty())
        return 0

    def freeze(self) -> None:
        """Leave its write faults unanswered."""
        with self._locked() as is_here:
            if is_here:
                self._mapping.handler.freeze()
                self._frozen = True

    def flush(self) -> None:
        """Do nothing: its pages live as long as the guest."""

    def thaw(self) -> None:
        """Answer its write faults again."""
        with self._guests.lock:
            self._frozen = False
            if self.is_here:
                self._mapping.handler.thaw()

    def private(self, *, settles: bool = True) -> int:
        """Return the pages private by its page tables; not settled, also charges never used."""
        with self._guests.lock:
            if not self.is_here:
                return 0
            if settles:
                self._mapping.account.settle()
            return _bits(self._mapping.account.private_bitmap())

    def load(self, runs: PackedRuns, to: memoryview) -> None:
        """Copy pages out of its memory; zeros if it has left."""
        with self._locked() as is_here:
            if is_here:
                self._unread |= page_bitmap(self._read(runs, to))
                return
        to[:] = bytes(len(to))

    def _read(self, runs: PackedRuns, to: memoryview) -> list[int]:
        """Copy pages, and return those that must be read again."""
        mapping = self._mapping
        try:
            return mapping.account.load_runs(mapping.fds[2], runs, to, is_frozen=self._frozen)
        except PeerGoneError:
            raise
        except PeerError as error:
            raise PeerError(f"guest {self.name!r}: {error}; end it") from error
        except OSError as error:
            raise PeerError(
                f"memory of guest {self.name!r} cannot be read: {error.strerror}; end it"
            ) from error

    def counters(self) -> dict[str, int]:
        """Return its counters."""
        with self._guests.lock:
            return counters_of(self._mapping.account.status()) if self.is_here else {}
