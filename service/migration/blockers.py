# SPDX-License-Identifier: Apache-2.0
"""Blockers, the reasons why a handoff cannot proceed, found by each end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from cowshed.cache import Image

__all__ = ["Blocker", "print_blockers", "wait_for_digests"]

_DIGEST_SECONDS: Final = 60.0
_LOOK_SECONDS: Final = 0.05

# "reason", and "guest" or "image" if it concerns one.
Blocker = dict[str, str]


def wait_for_digests(images: list[Image], look: Callable[[], None]) -> list[Blocker]:
    """Wait for the digests of images; return a blocker for each that is not known in time."""
    deadline = time.monotonic() + _DIGEST_SECONDS
    while not all(image.digest for image in images) and time.monotonic() < deadline:
        look()
        time.sleep(_LOOK_SECONDS)
    return [
        {"image": image.label, "reason": "its digest is not known yet; wait until status shows it"}
        for image in images
        if not image.digest
    ]


def print_blockers(what: str, blockers: list[Blocker]) -> str:
    """Format all blockers of doing `what` as one line."""
    lines = []
    for blocker in blockers[:5]:
        who = f"guest {blocker['guest']!r}: " if "guest" in blocker else ""
        which = f"image {blocker['image']!r}: " if "image" in blocker else ""
        lines.append(f"{who}{which}{blocker.get('reason', '?')}")
    more = f"; and {len(blockers) - 5} more" if len(blockers) > 5 else ""
    return f"cannot {what}: {'; '.join(lines)}{more}"
