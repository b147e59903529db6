# SPDX-License-Identifier: Apache-2.0
"""Which part of an image a machine's region may be of."""

from __future__ import annotations

import contextlib

import pytest

from cowshed.cache import PeerError
from cowshed.service.frontends.vmm.populator import check_regions
from cowshed.transport.vmm.handshakes import HUGE_PAGE_BYTES, MemoryRegion, Policy, VmmHandshake

PAGE = 4096
IMAGE = 3 * HUGE_PAGE_BYTES - 5 * PAGE
END = 3 * HUGE_PAGE_BYTES


@pytest.mark.parametrize(
    ("protocol", "page_bytes", "start", "end", "fits"),
    [
        ("firecracker", PAGE, 0, IMAGE, True),
        ("firecracker", PAGE, 0, IMAGE + PAGE, False),
        ("firecracker", PAGE, IMAGE - PAGE, IMAGE + PAGE, False),
        ("firecracker", PAGE, IMAGE, IMAGE + PAGE, False),
        ("firecracker", HUGE_PAGE_BYTES, 0, END, True),
        ("firecracker", HUGE_PAGE_BYTES, 0, END + HUGE_PAGE_BYTES, False),
        ("nydus", PAGE, 0, IMAGE, True),
        ("nydus", PAGE, 0, END, True),
        ("nydus", PAGE, 0, END + PAGE, False),
        ("nydus", PAGE, IMAGE, END, False),
    ],
)
def test_a_region_is_of_the_image_and_a_disks_may_be_rounded_up(
    protocol: str, page_bytes: int, start: int, end: int, fits: bool
) -> None:
    region = MemoryRegion(1 << 30, end - start, start, page_bytes)
    request = VmmHandshake(protocol, (region,), Policy.COPY, prefault=False)
    refused = pytest.raises(PeerError, match=rf"{IMAGE} bytes: check that the socket")
    with contextlib.nullcontext() if fits else refused:
        check_regions(request, IMAGE)
