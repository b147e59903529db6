# SPDX-License-Identifier: Apache-2.0
"""A small handoff, with sections of every kind that a file may hold."""

from __future__ import annotations

import random
from dataclasses import replace

from cowshed.transport.handoff.sections import (
    Dropped,
    GuestSection,
    Header,
    ImageBytes,
    ImageSection,
    ImageWhole,
    Pages,
    Section,
    StateWriter,
    Totals,
    WorkingSetSection,
)

PAGE = 4096
IMAGE = ImageSection("debian", "default", 100 * PAGE - 7, 65536, "sha256:1", "/srv/debian.raw")
WITH_BYTES = replace(
    IMAGE, name="other", has_bytes=True, allowed={"uids": (7,), "clients": ("a.example",)}
)
GUEST = GuestSection("g", 0, 1000, 1 << 20, "stop", "secret", "token x", "unix", {"misses": 3})
SECTIONS: list[Section] = [
    Header("h1", "host", 12),
    IMAGE,
    WITH_BYTES,
    GUEST,
    GuestSection("h", 0, -1, None, "allow", "t", "uid 0", "nbd"),
    ImageBytes(1, ((0, 1), (99, 1)), b"i" * 2 * PAGE),
    ImageWhole(1),
    WorkingSetSection(0, (3, 0, 6)),
    Pages(
        0, ((0, 1), (99, 1)), b"a" * PAGE + (random.Random(1).randbytes(300) + bytes(PAGE - 300))
    ),
    Pages(1, (), b""),
    Dropped(0, ((0, 1),)),
    Totals(0, 1, {"misses": 4}),
    Totals(1, 0),
]


def written(sections: list[Section] = SECTIONS) -> bytes:
    writer = StateWriter()
    return b"".join(writer.write(section) for section in sections) + writer.end()
