# SPDX-License-Identifier: Apache-2.0
"""What a guest may spend on private pages, over all its mappings; kept by the C core."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Self

from cowshed.cache import InvariantError, UsageError
from cowshed.cache._core import ffi, lib
from cowshed.cache.calls import CLOSED, checked
from cowshed.cache.images import PAGE_BYTES

__all__ = ["NO_QUOTA_BYTES", "Purse", "PurseStatus", "QuotaPolicy"]

# A quota nobody reaches: more than any image has.
NO_QUOTA_BYTES: Final = 1 << 60


class QuotaPolicy(IntEnum):
    """What a guest meets at its quota: it waits, it gets SIGBUS, or it is only counted."""

    STOP = lib.QUOTA_STOP
    KILL = lib.QUOTA_KILL
    ALLOW = lib.QUOTA_ALLOW


@dataclass(frozen=True)
class PurseStatus:
    """A purse, read while its guest runs: used_pages may be ahead of the copies made."""

    quota_pages: int
    used_pages: int
    policy: QuotaPolicy
    nr_accounts: int


class Purse:
    """A guest's quota, shared by the accounts of its mappings, all of one image."""

    def __init__(self, quota_bytes: int, policy: QuotaPolicy) -> None:
        """Raises UsageError for a quota of less than a page."""
        purse = ffi.new("struct purse **")
        checked(lib.purse_open(_quota_pages(quota_bytes), policy, purse), "opening a purse")
        self.cdata = purse[0]

    @classmethod
    def adopt(cls, fd: int) -> Self:
        """Go on with the purse in a memfd that another process left; takes fd over on success.

        It is empty until its accounts are adopted too. InvariantError if it is no purse of ours.
        """
        purse = ffi.new("struct purse **")
        err = lib.purse_adopt(fd, purse)
        if err == -errno.EBADMSG:
            raise InvariantError("what was left is no purse")
        checked(err, "adopting a purse")
        adopted = cls.__new__(cls)
        adopted.cdata = purse[0]
        return adopted

    def close(self) -> None:
        """Let go of it; accounts that were opened with it keep it."""
        if self.cdata is not CLOSED:
            lib.purse_close(self.cdata)
            self.cdata = CLOSED

    @property
    def fd(self) -> int:
        """The memfd that holds it, the purse's own."""
        return lib.purse_fd(self.cdata)

    def set_quota(self, quota_bytes: int, policy: QuotaPolicy) -> None:
        """Change the quota; who is stopped at it must be resumed by its fault handler."""
        checked(
            lib.purse_set_quota(self.cdata, _quota_pages(quota_bytes), policy), "changing a quota"
        )

    def status(self) -> PurseStatus:
        """Read it."""
        status = ffi.new("struct purse_status *")
        lib.purse_read(self.cdata, status)
        return PurseStatus(
            status.quota_pages, status.used_pages, QuotaPolicy(status.policy), status.nr_accounts
        )


def _quota_pages(quota_bytes: int) -> int:
    if quota_bytes < PAGE_BYTES:
        raise UsageError(
            f"a quota of {quota_bytes} bytes holds no page; give at least {PAGE_BYTES}"
        )
    return quota_bytes // PAGE_BYTES
