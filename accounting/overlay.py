# SPDX-License-Identifier: Apache-2.0
"""The private pages of a guest that maps nothing, kept by the backend in memory or in files."""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cowshed.accounting.ledger import Account
from cowshed.accounting.page_runs import PackedRuns
from cowshed.cache import InvariantError, SourceError, UsageError
from cowshed.cache._core import ffi, lib
from cowshed.cache.calls import CLOSED, checked
from cowshed.cache.images import PAGE_BYTES

if TYPE_CHECKING:
    from cowshed.cache._core import Array, StructOverlay

__all__ = ["Overlay", "OverlaySums"]

IDENTITY_BYTES: Final = 32


@dataclass(frozen=True)
class OverlaySums:
    """Pages of an overlay at one moment; in_hand are taken by requests and not private yet.

    counted, from its bitmap, should equal private, its account's counter; used, its quota's
    counter, should equal private plus in_hand.
    """

    counted: int
    private: int
    used: int
    in_hand: int


class Overlay:
    """One guest's private pages; all others are the image's. Close it before its account.

    The account's quota bounds it: at the quota a write is refused with "no space". The policy
    "allow" only counts.
    """

    def __init__(self, account: Account, cdata: StructOverlay | None = None) -> None:
        """Open an empty one in memory; files() gives one that outlives the process."""
        if cdata is None:
            overlay = ffi.new("struct overlay **")
            checked(
                lib.overlay_open(account.cdata, overlay),
                f"opening an overlay over {account.image.name!r}",
            )
            cdata = overlay[0]
        self.account: Final = account
        self.cdata = cdata

    @classmethod
    def adopt(cls, account: Account, fd: int) -> Overlay:
        """Adopt an overlay's memfd that another process left; its account was adopted before.

        Takes fd over on success. InvariantError if it is no overlay of the account's image.
        """
        overlay = ffi.new("struct overlay **")
        err = lib.overlay_adopt(account.cdata, fd, overlay)
        if err == -errno.EBADMSG:
            raise InvariantError(f"the inherited overlay is not of image {account.image.label!r}")
        checked(err, f"adopting an overlay over {account.image.name!r}")
        return cls(account, overlay[0])

    @classmethod
    def files(
        cls, account: Account, folder: Path, name: str, identity: bytes, *, is_adopted: bool = False
    ) -> Overlay:
        """Open the overlay in FOLDER/NAME.pages and FOLDER/NAME.map, or make it.

        identity: 32 bytes that no other image has (its digest). The files' private pages are
        charged to the account, past the quota too; is_adopted: the account was adopted, and its
        private pages count instead of the files'. UsageError if the files are another image's or
        open in another process; SourceError if they are damaged or cannot be opened: they are left
        as they are.
        """
        if len(identity) != IDENTITY_BYTES:
            raise UsageError(f"an identity of {len(identity)} bytes; give {IDENTITY_BYTES}")
        pages, table = folder / f"{name}.pages", folder / f"{name}.map"
        fds: list[int] = []
        try:
            for path in (pages, table):
                fds.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # noqa: PERF401
            overlay = ffi.new("struct overlay **")
            _sync_folder(folder)
            place = lib.overlay_adopt_files if is_adopted else lib.overlay_open_files
            _check_open(place(account.cdata, fds[0], fds[1], identity, overlay), pages)
        except OSError as error:
            _close_all(fds)
            raise SourceError(f"{error.filename or folder}: {error.strerror}") from error
        except BaseException:
            _close_all(fds)
            raise
        return cls(account, overlay[0])

    def load(self, first_page: int, nr_pages: int) -> bytes:
        """Copy the bytes of private pages, each page consistently; other pages read as zeros."""
        pages = bytearray(nr_pages * PAGE_BYTES)
        checked(
            lib.overlay_load(self.cdata, first_page, nr_pages, ffi.from_buffer(pages)),
            f"reading an overlay over {self.account.image.label!r}",
        )
        return bytes(pages)

    def load_runs(self, runs: PackedRuns, to: memoryview) -> None:
        """Copy the pages of runs, one after another, as load() does; `to` must be as long."""
        assert len(to) == runs.check(self.account.image.nr_pages) * PAGE_BYTES
        checked(
            lib.overlay_load_runs(
                self.cdata, ffi.from_buffer(runs.raw), len(runs), ffi.from_buffer(to)
            ),
            f"reading an overlay over {self.account.image.label!r}",
        )

    def store(self, first_page: int, pages: bytes | memoryview) -> None:
        """Make pages private with these bytes, past the quota too. OSError if there is no room."""
        nr_pages = len(pages) // PAGE_BYTES
        err = lib.overlay_store(self.cdata, first_page, nr_pages, ffi.from_buffer(pages))
        if err < 0:
            raise OSError(-err, f"writing an overlay over {self.account.image.label!r}")

    def store_runs(self, runs: PackedRuns, pages: bytes | memoryview) -> None:
        """Make the pages of runs private, one after another, as store() does."""
        assert len(pages) == runs.check(self.account.image.nr_pages) * PAGE_BYTES
        err = lib.overlay_store_runs(
            self.cdata, ffi.from_buffer(runs.raw), len(runs), ffi.from_buffer(pages)
        )
        if err < 0:
            raise OSError(-err, f"writing an overlay over {self.account.image.label!r}")

    def drop(self, first_page: int, nr_pages: int) -> None:
        """Give pages back to the image."""
        checked(
            lib.overlay_drop(self.cdata, first_page, nr_pages),
            f"trimming an overlay over {self.account.image.label!r}",
        )

    def flush(self) -> None:
        """Return once what was written is as durable as it gets. SourceError if that fails."""
        err = lib.overlay_flush_now(self.cdata)
        if err < 0:
            raise SourceError(
                f"cannot flush an overlay over {self.account.image.label!r}: {os.strerror(-err)}"
            )

    def close(self) -> None:
        """Close it; no export may use it any more. In memory, its pages are lost.

        With files, flushes first: SourceError if that fails.
        """
        if self.cdata is not CLOSED:
            cdata, self.cdata = self.cdata, CLOSED
            checked(
                lib.overlay_close(cdata), f"closing an overlay over {self.account.image.name!r}"
            )

    def discard(self) -> None:
        """Give every private page back: the overlay then reads as the image does."""
        if self.cdata is CLOSED:
            raise UsageError("the overlay is closed; nothing is left to discard")
        checked(
            lib.overlay_discard(self.cdata),
            f"discarding an overlay over {self.account.image.name!r}",
        )

    @property
    def fd(self) -> int:
        """The memfd or file with the private pages, each at its place in the image. Borrowed."""
        return lib.overlay_fd(self.cdata)

    def track(self, on: bool) -> None:
        """Begin to track writes, or end that; at first all private pages are dirty."""
        checked(
            lib.overlay_track(self.cdata, int(on)),
            f"tracking an overlay over {self.account.image.name!r}",
        )

    def take_dirty(self) -> bytes:
        """Take the pages that became private, were written, or are private no more, as a bitmap.

        A page read afterwards has every byte, or is dirty again. UsageError if they are not
        tracked.
        """
        words = bytearray(8 * ((self.account.image.nr_pages + 63) // 64))
        result = lib.overlay_take_dirty(
            self.cdata, ffi.from_buffer("uint64_t[]", words), len(words) // 8
        )
        if result == -errno.EINVAL:
            raise UsageError("the overlay is not tracked; track() it first")
        checked(result, "taking dirty pages")
        return bytes(words)

    def freeze(self) -> None:
        """Hold back every change until thaw(): requests wait, none fails. Reads go on."""
        lib.overlay_freeze(self.cdata)

    def thaw(self) -> None:
        """End a freeze: waiting requests go on. Nothing to do is no error."""
        lib.overlay_thaw(self.cdata)

    def stored_bitmap(self) -> bytes:
        """The pages it holds bytes for, as Account.private_bitmap; a subset of that one."""
        return self._bitmap(lib.overlay_stored)

    def stray_bitmap(self) -> bytes:
        """The pages that it holds bytes for and that are not private; there should be none.

        Requests may write meanwhile. None are found where holes are larger than a page.
        """
        return self._bitmap(lib.overlay_strays)

    def sums(self) -> OverlaySums:
        """Count its pages; writes wait meanwhile, for microseconds per GiB."""
        sums = ffi.new("struct overlay_sums *")
        lib.overlay_sums(self.cdata, sums)
        return OverlaySums(
            counted=sums.counted_pages,
            private=sums.private_pages,
            used=sums.used_pages,
            in_hand=sums.in_hand_pages,
        )

    def _bitmap(self, read: Callable[[StructOverlay, Array[int], int], int]) -> bytes:
        words = array("Q", bytes(8 * ((self.account.image.nr_pages + 63) // 64)))
        checked(
            read(self.cdata, ffi.from_buffer("uint64_t[]", words), len(words)),
            f"looking at an overlay over {self.account.image.name!r}",
        )
        return words.tobytes()


def _check_open(result: int, path: Path) -> None:
    if result == -errno.ESTALE:
        raise UsageError(f"{path} was made over another image; move it and its map away")
    if result == -errno.EBUSY:
        raise UsageError(f"{path} is open in another process; end that, or use another folder")
    if result == -errno.EBADMSG:
        raise SourceError(f"{path} and its map are damaged; restore them, or move them away")
    if result < 0:
        raise OSError(-result, os.strerror(-result), str(path))


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
