# SPDX-License-Identifier: Apache-2.0
"""The receiving end of a handoff's bytes: a copy of a guest's private pages."""

from __future__ import annotations

import contextlib
import os

from stage import PAGE, MappedGuest, until

from cowshed.cache import PeerError


def pages_of(bitmap: bytes) -> list[int]:
    return [i for i in range(len(bitmap) * 8) if bitmap[i // 8] >> i % 8 & 1]


def bitmap_of(pages: list[int]) -> bytes:
    number = sum(1 << page for page in pages)
    return number.to_bytes((number.bit_length() + 7) // 8, "little")


def dirty(guest: MappedGuest) -> list[int]:
    return pages_of(guest.account.take_dirty())


def private(guest: MappedGuest) -> set[int]:
    return set(pages_of(guest.account.private_bitmap()))


def memory(guest: MappedGuest, page: int) -> bytes | None:
    """Return the guest's bytes there, if they can be read without a fault."""
    try:
        return os.pread(guest.fds[2], PAGE, guest.base + page * PAGE)
    except OSError:
        return None


def freeze(guest: MappedGuest) -> None:
    """Freeze it; retries, since a freeze gives up after a second, which a busy machine may take."""

    def is_frozen() -> bool:
        with contextlib.suppress(PeerError):
            guest.handler.freeze()
        return guest.account.status().frozen

    until(is_frozen, "the guest is frozen")


class Copy:
    """A tracker's copy of a guest's private pages."""

    def __init__(self) -> None:
        self.pages: dict[int, bytes | None] = {}

    def update(self, guest: MappedGuest) -> list[int]:
        """Take the dirty pages, and read them afterwards."""
        taken = dirty(guest)
        mine = private(guest)
        for page in taken:
            if page in mine:
                self.pages[page] = memory(guest, page)
            else:
                self.pages.pop(page, None)
        return taken

    def differs(self, guest: MappedGuest) -> list[int]:
        """Return the pages of a frozen guest that differ from the copy."""
        mine = private(guest)
        return [
            page
            for page in mine | self.pages.keys()
            if page not in mine or self.pages.get(page) != memory(guest, page)
        ]
