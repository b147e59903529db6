# SPDX-License-Identifier: Apache-2.0
"""A guest's quota of private pages, over all its mappings; kept by the C core."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Self

from cowshed.cache import InvariantError, UsageError
from cowshed.cache._core import ffi, lib
from cowshed.cache.calls import CLOSED, checked
from cowshed.cache.images import PAGE_BYTES

__all__ = ["NO_QUOTA_BYTES", "Quota", "QuotaPolicy", "QuotaStatus"]

# An unlimited quota: more than any image has.
NO_QUOTA_BYTES: Final = 1 << 60


class QuotaPolicy(IntEnum):
    """What happens to a guest at its quota: it waits, it gets SIGBUS, or it is only counted."""

    STOP = lib.QUOTA_STOP
    KILL = lib.QUOTA_KILL
    ALLOW = lib.QUOTA_ALLOW


@dataclass(frozen=True)
class QuotaStatus:
    """A quota, read while its guest runs: used_pages may be ahead of the copies made."""

    quota_pages: int
    used_pages: int
    policy: QuotaPolicy
    nr_accounts: int


class Quota:
    """A guest's quota, shared by the accounts of its mappings, all of one image."""

    def __init__(self, quota_bytes: int, policy: QuotaPolicy) -> None:
        """Raises UsageError for a quota of less than a page."""
        quota = ffi.new("struct quota **")
        checked(lib.quota_open(_quota_pages(quota_bytes), policy, quota), "opening a quota")
        self.cdata = quota[0]

    @classmethod
    def adopt(cls, fd: int) -> Self:
        """Adopt the quota in a memfd that another process left; takes fd over on success.

        Its used pages are 0 until its accounts are adopted. InvariantError if fd is no quota.
        """
        quota = ffi.new("struct quota **")
        err = lib.quota_adopt(fd, quota)
        if err == -errno.EBADMSG:
            raise InvariantError("the inherited descriptor is not a quota")
        checked(err, "adopting a quota")
        adopted = cls.__new__(cls)
        adopted.cdata = quota[0]
        return adopted

    def close(self) -> None:
        """Drop this reference; the quota's accounts keep theirs."""
        if self.cdata is not CLOSED:
            lib.quota_close(self.cdata)
            self.cdata = CLOSED

    @property
    def fd(self) -> int:
        """The quota's memfd. Borrowed."""
        return lib.quota_fd(self.cdata)

    @property
    def limit_bytes(self) -> int | None:
        """The bytes of private pages that it allows; None if it is unlimited."""
        limit_bytes = self.status().quota_pages * PAGE_BYTES
        return None if limit_bytes >= NO_QUOTA_BYTES else limit_bytes

    def set_quota(self, quota_bytes: int, policy: QuotaPolicy) -> None:
        """Change the quota; the caller must resume guests that are stopped at it."""
        checked(lib.quota_set(self.cdata, _quota_pages(quota_bytes), policy), "changing a quota")

    def status(self) -> QuotaStatus:
        """Read the limit, the used pages, the policy and the number of accounts."""
        status = ffi.new("struct quota_status *")
        lib.quota_read(self.cdata, status)
        return QuotaStatus(
            status.quota_pages, status.used_pages, QuotaPolicy(status.policy), status.nr_accounts
        )


def _quota_pages(quota_bytes: int) -> int:
    if quota_bytes < PAGE_BYTES:
        raise UsageError(
            f"a quota of {quota_bytes} bytes holds no page; give at least {PAGE_BYTES}"
        )
    return quota_bytes // PAGE_BYTES
