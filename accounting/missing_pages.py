# SPDX-License-Identifier: Apache-2.0
"""Pages of an overlay whose bytes are still at the backend that the guest came from."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, Final

from cowshed.accounting.overlay import Overlay
from cowshed.cache._core import ffi, lib
from cowshed.cache.calls import checked
from cowshed.cache.errors import UsageError
from cowshed.cache.images import PAGE_BYTES

__all__ = ["MissingPages"]


class MissingPages:
    """The missing pages of one overlay. The overlay has the state: any number of these may be made.

    Bitmaps are numbers: bit i is page i. A page is missing from expect() until it arrives, or the
    guest writes the whole of it or gives it back; a request that needs it meanwhile waits, and the
    page is wanted. A request that needs a lost page gets an input/output error.
    """

    def __init__(self, overlay: Overlay) -> None:
        self._overlay: Final = overlay

    def expect(self, first_page: int, nr_pages: int) -> None:
        """Make pages private and missing, past the quota too; the overlay must not be in use yet.

        UsageError if one is private already.
        """
        err = lib.overlay_expect(self._overlay.cdata, first_page, nr_pages)
        if err == -errno.EEXIST:
            raise UsageError(f"a page of {nr_pages} from {first_page} is private already")
        checked(err, f"expecting pages of {self._label}")

    def arrive(self, first_page: int, pages: bytes | memoryview) -> int:
        """Store the bytes of pages that are missing; return how many. OSError without room."""
        nr = lib.overlay_arrive(
            self._overlay.cdata, first_page, len(pages) // PAGE_BYTES, ffi.from_buffer(pages)
        )
        if nr < 0:
            raise OSError(-nr, f"writing an overlay over {self._label}")
        return int(nr)

    def bitmap(self) -> int:
        """The missing pages."""
        return self._bitmap(lib.overlay_missing)

    def take_wanted(self) -> int:
        """Take the missing pages that became wanted since the last call."""
        return self._bitmap(lib.overlay_take_wanted)

    @property
    def fd(self) -> int:
        """An eventfd, borrowed; -1 if no page was ever missing.

        Readable when pages are wanted, or none is missing any more; take_wanted() resets it.
        """
        return max(-1, lib.overlay_missing_fd(self._overlay.cdata))

    @property
    def nr_left(self) -> int:
        """How many pages are missing."""
        return self._overlay.account.status().preloaded_pages

    def lose(self, first_page: int, nr_pages: int) -> int:
        """Mark the missing ones of these pages as lost; return how many were not lost before."""
        return checked(
            lib.overlay_lose(self._overlay.cdata, first_page, nr_pages),
            f"marking pages of {self._label} as lost",
        )

    def find(self) -> None:
        """Mark no page as lost any more: a backend may have them after all."""
        lib.overlay_find(self._overlay.cdata)

    @property
    def nr_lost(self) -> int:
        """How many missing pages are lost."""
        return lib.overlay_nr_lost(self._overlay.cdata)

    @property
    def _label(self) -> str:
        return self._overlay.account.image.label

    def _bitmap(self, read: Callable[[Any, Any, int], int]) -> int:
        words = bytearray(8 * ((self._overlay.account.image.nr_pages + 63) // 64))
        checked(
            read(self._overlay.cdata, ffi.from_buffer("uint64_t[]", words), len(words) // 8),
            f"looking at missing pages of {self._label}",
        )
        return int.from_bytes(words, "little")
