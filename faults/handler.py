# SPDX-License-Identifier: Apache-2.0
"""A guest's fault thread, as Python sees it: started with options, and stopped."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cowshed.cache import PeerError, UsageError
from cowshed.cache._core import ffi, lib
from cowshed.cache.calls import CLOSED, checked
from cowshed.cache.errors import PeerGoneError
from cowshed.cache.images import PAGE_BYTES

if TYPE_CHECKING:
    from cowshed.cache._core import StructAccount, StructFaultOptions

__all__ = ["FaultHandler", "FaultOptions", "uffd_features"]


@dataclass(frozen=True)
class FaultOptions:
    """How faults are answered. A window of 0 adapts; else it is bytes, a power of two, whole pages.

    window_bytes: mapped per fault, 16 MiB at most. write_window_bytes: opened per write fault,
    256 KiB at most. spin_ns: how long to look for the next fault before sleeping, while it pays.
    """

    window_bytes: int = 0
    write_window_bytes: int = 0
    spin_ns: int = 20_000

    def __post_init__(self) -> None:
        _check_window("window", self.window_bytes, lib.WINDOW_MAX_PAGES)
        _check_window("write window", self.write_window_bytes, lib.WINDOW_WRITE_MAX_PAGES)


def _check_window(what: str, window_bytes: int, max_pages: int) -> None:
    nr_pages, rest = divmod(window_bytes, PAGE_BYTES)
    if window_bytes == 0:
        return
    if rest or not 0 < nr_pages <= max_pages or nr_pages & (nr_pages - 1):
        raise UsageError(
            f"a {what} of {window_bytes} bytes is not possible; give 0 (adaptive) or a power of "
            f"two from {PAGE_BYTES} to {max_pages * PAGE_BYTES}"
        )


def uffd_features() -> int:
    """The UFFD_FEATURE_* bits that a guest's userfaultfd must have been made with."""
    return lib.guest_uffd_features()


class FaultHandler:
    """Answers one guest's faults until stop(). The descriptors are borrowed until then.

    account is the C account (Account.cdata) that was placed at the guest's mapping. pidfd is the
    process that gets SIGBUS under QuotaPolicy.KILL, or -1.
    """

    def __init__(
        self, account: StructAccount, uffd: int, pidfd: int, options: FaultOptions
    ) -> None:
        guest = ffi.new("struct guest **")
        checked(
            lib.guest_start(account, uffd, pidfd, to_struct(options), guest),
            "starting a fault thread",
        )
        self._guest = guest[0]
        self._account = account

    def stop(self) -> None:
        """Join the thread; it never answers faults that are still blocked."""
        if self._guest is not CLOSED:
            lib.guest_stop(self._guest)
            self._guest = CLOSED

    def poison_absent(self) -> None:
        """Poison the pages that are not in the guest's memory, for good.

        For a guest without a userfaultfd of its own, before stop(). Does nothing to memory that is
        gone.
        """
        lib.guest_poison_absent(self._guest)

    def resume(self) -> None:
        """Wake blocked faults, so that they are tried again: after a change of quota."""
        lib.guest_resume(self._guest)

    def track(self, on: bool) -> None:
        """Begin to track writes to private pages, or end that; repeating either does nothing.

        At first all private pages are dirty; Account.take_dirty takes them. UsageError if the
        guest's memory is populated by copy; PeerGoneError if its memory is gone.
        """
        _check_tracked(lib.account_track(self._account, int(on)), "tracking private pages")

    def freeze(self) -> None:
        """Stop every change to the guest's private bytes until thaw().

        From its return on, writes are not answered and discards (madvise) wait; reads are answered,
        unless a discard waits. Nothing is lost: thaw() wakes all blocked faults. UsageError if its
        memory is populated by copy; PeerError, and nothing is frozen, if the guest cannot be
        stopped within a second; PeerGoneError if its memory is gone. Milliseconds for a guest whose
        dirty pages were just taken.
        """
        _check_tracked(lib.guest_freeze(self._guest), "freezing a guest")

    def thaw(self) -> None:
        """End a freeze and wake blocked faults. Nothing to do is no error."""
        lib.guest_thaw(self._guest)


def _check_tracked(result: int, what: str) -> None:
    if result == -errno.EOPNOTSUPP:
        raise UsageError(f"{what}: its memory is populated, and cannot be protected page by page")
    if result == -errno.ESRCH:
        raise PeerGoneError(f"{what}: its memory is gone")
    if result < 0 and -result != errno.ENOMEM:
        raise PeerError(f"{what}: {os.strerror(-result)}")
    checked(result, what)


def to_struct(options: FaultOptions) -> StructFaultOptions:
    """Return the C struct of fault options."""
    return ffi.new(
        "struct fault_options *",
        {
            "window_pages": options.window_bytes // PAGE_BYTES,
            "write_window_pages": options.write_window_bytes // PAGE_BYTES,
            "spin_ns": options.spin_ns,
        },
    )
