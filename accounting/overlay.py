# SPDX-License-Identifier: Apache-2.0
"""The private pages of a guest that maps nothing, kept by the backend in memory or in files."""

from __future__ import annotations

from array import array

from cowshed.accounting.ledger import Account
from cowshed.cache import UsageError
from cowshed.cache._core import ffi, lib
from cowshed.cache.calls import checked

__all__ = ["Overlay"]


class Overlay:
    """One guest's own pages; everything else is the image's. Close it before its account.

    The account's quota bounds it: at the limit a write is refused. Its policy "allow" only counts.
    """

    def __init__(self, account: Account) -> None:
        overlay = ffi.new("struct overlay **")
        checked(
            lib.overlay_open(account.cdata, overlay),
            f"opening an overlay over {account.image.name!r}",
        )
        self.account = account
        self.cdata = overlay[0]

    def close(self) -> None:
        """Give it up; no export may use it any more. In memory, its pages are lost."""
        if self.cdata is not None:
            cdata, self.cdata = self.cdata, None
            checked(
                lib.overlay_close(cdata), f"closing an overlay over {self.account.image.name!r}"
            )

    def discard(self) -> None:
        """Give every private page back: from now on it reads as the image does."""
        if self.cdata is None:
            raise UsageError("the overlay is closed; nothing is left to discard")
        checked(
            lib.overlay_discard(self.cdata),
            f"discarding an overlay over {self.account.image.name!r}",
        )

    def stored_bitmap(self) -> bytes:
        """The pages it holds bytes for, as Account.private_bitmap; a subset of that one."""
        words = array("Q", bytes(8 * ((self.account.image.nr_pages + 63) // 64)))
        checked(
            lib.overlay_stored(self.cdata, ffi.from_buffer("uint64_t[]", words), len(words)),
            f"looking at an overlay over {self.account.image.name!r}",
        )
        return words.tobytes()
