# SPDX-License-Identifier: Apache-2.0
"""The quota and policy of guests whose private pages the backend keeps."""

from __future__ import annotations

from dataclasses import dataclass

from cowshed.accounting import QuotaPolicy
from cowshed.cache.errors import UsageError
from cowshed.service.runtime.sizes import format_bytes

__all__ = ["OverlayLimits"]


@dataclass(frozen=True)
class OverlayLimits:
    """The default quota and policy, and the largest quota a guest may request; None: no limit.

    The pages are in the backend's memory or on its disk, so the guest must not choose how many.
    """

    default_bytes: int | None = None
    default_policy: QuotaPolicy = QuotaPolicy.STOP
    most_bytes: int | None = None

    def agree(
        self, quota_bytes: int | None, policy: QuotaPolicy | None
    ) -> tuple[int | None, QuotaPolicy]:
        """Return the quota and policy for a request; None requests the default.

        UsageError if a guest may not have them.
        """
        if policy is QuotaPolicy.ALLOW and self.default_policy is not QuotaPolicy.ALLOW:
            raise UsageError(
                "on_quota 'allow' is not for guests whose pages the backend keeps: ask for 'stop', "
                'or have its operator configure on_quota = "allow"'
            )
        if quota_bytes is None:
            known = [each for each in (self.default_bytes, self.most_bytes) if each is not None]
            quota_bytes = min(known, default=None)
        elif self.most_bytes is not None and quota_bytes > self.most_bytes:
            raise UsageError(
                f"a quota of {format_bytes(quota_bytes)} is more than the "
                f"{format_bytes(self.most_bytes)} that a guest may ask for here: ask for less, or "
                "have its operator raise network_quota"
            )
        return quota_bytes, self.default_policy if policy is None else policy
