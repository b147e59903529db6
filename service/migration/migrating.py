# SPDX-License-Identifier: Apache-2.0
"""A guest that is to move, whatever it is here: what is asked of it, and what keeps it from each.

A guest that maps has its private pages in its own memory, where they are read through the
descriptor of /proc/PID/mem that it gave us. One that maps nothing has them in its overlay.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict
from typing import Final, Protocol

from cowshed.accounting import AccountStatus, MissingPages, Region
from cowshed.cache import Image, PeerError
from cowshed.cache.images import PAGE_BYTES
from cowshed.service.guests.guests import Guest, GuestTable
from cowshed.service.overlays.claims import CARRIER
from cowshed.service.overlays.overlays import OverlayGuest
from cowshed.transport.handoff.sections import GuestSection

__all__ = [
    "MigratingGuest",
    "MigratingMapping",
    "MigratingOverlay",
    "Runs",
    "counters_of",
    "owner_of_token",
]

# Each a first page and a number of pages, in order.
Runs = Sequence[tuple[int, int]]


def owner_of_token(token: str) -> str:
    """Give the owner of an overlay that whoever knows a token may come back to."""
    return f"token {hashlib.sha256(token.encode()).hexdigest()[:32]}"


class MigratingGuest(Protocol):
    """One guest that is to move. Bitmaps are numbers: bit i is page i."""

    token: str

    @property
    def name(self) -> str:
        """Its name, unique in its domain."""

    @property
    def image(self) -> Image:
        """Its image."""

    def keep_token(self, token: str) -> None:
        """Take the token that an earlier export made for a guest that named none."""

    def blockers(self) -> list[str]:
        """Why it cannot move; nothing if it can."""

    def section(self, image_no: int) -> GuestSection:
        """What the target is to make of it."""

    def track(self, on: bool) -> None:
        """From now on take_dirty() knows what is written; or no more."""

    def take_dirty(self) -> int:
        """The pages made private or written since the last call, or since track()."""

    def freeze(self) -> None:
        """Once this returns no private byte changes, until thaw()."""

    def flush(self) -> None:
        """What it has is as durable as it gets. Raises SourceError."""

    def thaw(self) -> None:
        """Let it write again."""

    def private(self) -> int:
        """The private pages that there are."""

    def load(self, runs: Runs) -> bytes:
        """Copy private pages; PeerError if they cannot be read, the guest being gone, say."""

    def counters(self) -> dict[str, int]:
        """What was counted for it until now."""


def _bits(bitmap: bytes) -> int:
    return int.from_bytes(bitmap, "little")


def counters_of(status: AccountStatus) -> dict[str, int]:
    """What a section says was counted."""
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
        """Bytes that are still at the backend it came from, or are lost with that."""
        if self.guest.owner.startswith(CARRIER):
            return ["its program has not come yet from the backend it was at; wait until it has"]
        missing = MissingPages(self.guest.overlay)
        if missing.nr_lost:
            why = "were lost with the backend it came from; let it write them anew, or discard it"
            return [f"{missing.nr_lost} of its private pages {why}"]
        if missing.nr_left:
            why = "have not come yet from the backend it came from; wait until they have"
            return [f"{missing.nr_left} of its private pages {why}"]
        return []

    def section(self, image_no: int) -> GuestSection:
        """It stays whose it was, so that its clients find it there as here."""
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
        """Begin or end to note what is written."""
        self.guest.overlay.track(on)

    def take_dirty(self) -> int:
        """What was written since the last call."""
        return _bits(self.guest.overlay.take_dirty())

    def freeze(self) -> None:
        """Hold its clients' writes."""
        self.guest.overlay.freeze()

    def flush(self) -> None:
        """Have its pages outlive us, if they are in files."""
        self.guest.overlay.flush()

    def thaw(self) -> None:
        """Let them go on."""
        self.guest.overlay.thaw()

    def private(self) -> int:
        """Its pages."""
        return _bits(self.guest.account.private_bitmap())

    def load(self, runs: Runs) -> bytes:
        """Copy pages out of the overlay."""
        return b"".join(self.guest.overlay.load(*run) for run in runs)

    def counters(self) -> dict[str, int]:
        """What was counted."""
        return counters_of(self.guest.account.status())


class MigratingMapping:
    """A guest that maps the image. It may leave at any time; it has moved without pages then.

    Until it is frozen it may discard a page between our seeing it and our reading it. Such a page
    is given as zeros, and counts as written: who takes what is dirty looks at it again.
    """

    def __init__(self, guest: Guest, guests: GuestTable) -> None:
        self.guest: Final = guest
        self._guests = guests
        self._mapping = guest.mappings[0]
        self.token = guest.request.token or secrets.token_hex(16)
        self._frozen = False
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
        """Take it, unless it named one."""
        if self.guest.request.token is None:
            self.token = token

    @property
    def is_here(self) -> bool:
        """Whether it is attached still; with the table's lock it stays so."""
        return self._mapping in self.guest.mappings

    def blockers(self) -> list[str]:
        """Several mappings may have different bytes for one page; a dead one has none."""
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
        """It comes back by its token, wherever from."""
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
        """Begin or end to note what is written."""
        with self._guests.lock:
            if self.is_here:
                self._mapping.handler.track(on)

    def take_dirty(self) -> int:
        """What was written since the last call."""
        with self._guests.lock:
            unread, self._unread = self._unread, 0
            return unread | _bits(self._mapping.account.take_dirty()) if self.is_here else 0

    def freeze(self) -> None:
        """Leave its write faults unanswered."""
        with self._guests.lock:
            if self.is_here:
                self._mapping.handler.freeze()
                self._frozen = True

    def flush(self) -> None:
        """Nothing to do: its pages live as long as it does."""

    def thaw(self) -> None:
        """Answer them."""
        with self._guests.lock:
            self._frozen = False
            if self.is_here:
                self._mapping.handler.thaw()

    def private(self) -> int:
        """What is private by its page tables, not what was paid for and never copied."""
        with self._guests.lock:
            if not self.is_here:
                return 0
            self._mapping.account.settle()
            return _bits(self._mapping.account.private_bitmap())

    def load(self, runs: Runs) -> bytes:
        """Copy pages out of its memory; zeros of one that has left."""
        with self._guests.lock:
            if not self.is_here:
                return bytes(PAGE_BYTES * sum(nr for _, nr in runs))
            regions = self._mapping.account.regions()
            pages = b"".join(self._of(regions, *run) for run in runs)
            if regions != self._mapping.account.regions():  # it moved some of it meanwhile
                for first, nr in runs:
                    self._unread |= ((1 << nr) - 1) << first
        return pages

    def _of(self, regions: Sequence[Region], first_page: int, nr_pages: int) -> bytes:
        offset, end = first_page * PAGE_BYTES, (first_page + nr_pages) * PAGE_BYTES
        pages = b""
        for region in regions:
            if region.offset <= offset < region.offset + region.length:
                nr = min(end, region.offset + region.length) - offset
                pages += self._read(region, offset, nr)
                offset += nr
        if offset != end:
            raise PeerError(f"guest {self.name!r} has private pages that it maps no more; end it")
        return pages

    def _read(self, region: Region, offset: int, nr_bytes: int) -> bytes:
        pages = b""
        while len(pages) < nr_bytes:
            at = offset + len(pages)
            try:
                got = os.pread(
                    self._mapping.fds[2], nr_bytes - len(pages), region.address + at - region.offset
                )
            except OSError as error:
                if self._frozen or error.errno != errno.EIO:
                    raise PeerError(
                        f"memory of guest {self.name!r} cannot be read: {error.strerror}; end it"
                    ) from error
                self._unread |= 1 << at // PAGE_BYTES
                got = bytes(PAGE_BYTES)
            if not got:
                raise PeerError(f"guest {self.name!r} has ended, with its memory")
            pages += got
        return pages

    def counters(self) -> dict[str, int]:
        """What was counted."""
        with self._guests.lock:
            return counters_of(self._mapping.account.status()) if self.is_here else {}
