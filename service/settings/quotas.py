# SPDX-License-Identifier: Apache-2.0
"""Parse and check quotas."""

from __future__ import annotations

from typing import Final

from cowshed.cache.errors import UsageError
from cowshed.service.runtime.sizes import parse_size

__all__ = ["check_quota", "parse_quota"]

_PAGE_BYTES: Final = 4096


def check_quota(quota_bytes: int) -> None:
    """Raise UsageError for a quota below one page: its guest would stop at its first write."""
    if quota_bytes < _PAGE_BYTES:
        raise UsageError(
            f"quota of {quota_bytes} bytes is less than a page: "
            "give 4K or more, or 'none' for no limit"
        )


def parse_quota(text: str) -> int | None:
    """Parse a quota: a size, or ``none`` for no limit. Raises UsageError."""
    if text.strip().lower() == "none":
        return None
    quota_bytes = parse_size(text, "quota")
    check_quota(quota_bytes)
    return quota_bytes
